"""Block-sparse attention by compiled FlexAttention: on the CPU, on devices without a kernel of ours, and for any mask.

The rule is :func:`afbs_compile.kernels.spec.attention.masked_attention` with every ``lam`` at ``LAMBDA_OFF``: this
engine skips no product with V, which is never less accurate.

FlexAttention is fast only when it is compiled. Eager, it holds an N x N tensor per head and is many times slower than
dense attention, and torch.compile falls back to eager silently (recompile limit, ``suppress_errors``, a stance,
``TORCHDYNAMO_DISABLE``). Here that cannot happen: :func:`_fused` refuses to run uncompiled, and :func:`attend` then
takes :func:`_attend_by_rows` and says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.exc
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.machine import compile_key
from afbs_compile.kernels.blocks import BlockLists, BlockShape, chunks, lists_of, live_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.compilations import forget_compilations, note_compilation
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.operands import Operands, dense_attention
from afbs_compile.kernels.select import plain

LARGEST_TILE = {torch.float32: 128, torch.bfloat16: 64, torch.float16: 64}
"""Rows per block handed to FlexAttention; larger blocks are cut. On the CPU 128 x 128 takes 6 to 28 % less time than
64 x 64 in fp32. In bf16 the two are within noise of each other, and 128 x 128 was once seen to be ten times slower."""

COMMONEST = Causal()
"""What a call without partial blocks is compiled with, for its mask is not looked at: no kernel of its own."""

ROWS_AT_ONCE = 512
"""Query rows whose mask :func:`_attend_by_rows` holds at a time; a multiple of every block shape."""


class UnfusedAttentionWarning(UserWarning):
    """FlexAttention cannot be compiled here; a correct but slower path runs."""


class NotCompiledError(RuntimeError):
    """FlexAttention was about to run eagerly."""


@functools.lru_cache(maxsize=64)
def _mask_mod(mask: Mask, offset: int) -> Callable[..., Tensor]:
    """What a row sees inside partial blocks; one function for a mask, so that it compiles once."""

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return mask.sees(row + offset if offset else row, key)

    return sees


def _fused(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Body of the compiled function."""
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiledError("torch.compile did not compile it (a stance, or TORCHDYNAMO_DISABLE)")
    return flex_attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True)


def _inductor(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """The backend: PyTorch's own, which leaves nothing behind after ``torch._dynamo.reset()``."""
    note_compilation()
    lowered: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")(gm, example_inputs)
    return lowered


_inductor.reset = forget_compilations  # type: ignore[attr-defined]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The compiled function: one kernel for all lengths, key heads and masks.

    Another dtype, head_dim, scale or number of query heads per key head compiles again, and so does a single key head.
    """
    return torch.compile(_fused, backend=_inductor, dynamic=True, fullgraph=True)


_uncompilable: dict[Hashable, str] = {}
"""Why FlexAttention failed to compile, by kind of call: it is not tried again."""


def _tiles(dtype: torch.dtype, shape: BlockShape) -> BlockShape:
    """Rows of queries and of keys per block as FlexAttention is handed them."""
    return BlockShape(min(shape.q, LARGEST_TILE[dtype]), min(shape.k, LARGEST_TILE[dtype]))


class Flex(Engine):
    """Compiled FlexAttention, on every device and for every call that computes in the operands' precision.

    The first call of a kind (dtype, head_dim, scale, query heads per key head) compiles for some seconds.
    """

    name = "flex"
    title = "FlexAttention"
    family = "flex"
    # FlexAttention is handed 64 x 64 tiles on the CPU, whatever the blocks: larger ones compute more, no faster.
    shapes = (BlockShape(64, 64),)

    def serves(self, device: torch.device) -> bool:
        """See :meth:`Engine.serves`."""
        return True

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        """See :meth:`Engine.refusal`."""
        return None

    def select(self, operands: Operands, call: SparseCall) -> BlockLists:
        """See :meth:`Engine.select`."""
        return plain.select(operands, call)

    def layout(self, operands: Operands, call: SparseCall) -> str:
        """See :meth:`Engine.layout`. FlexAttention is taken to compile until it has failed to."""
        if self.note(operands) is not None:
            return "masked dense attention"
        return f"flex {_tiles(operands.q.dtype, call.shape)} tiles"

    def note(self, operands: Operands) -> str | None:
        """Why it is not FlexAttention that computes."""
        reason = _uncompilable.get(_kind(operands))
        return None if reason is None else f"FlexAttention cannot be compiled: {reason}"

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        """See :meth:`Engine.attend`.

        Warns:
            UnfusedAttentionWarning: FlexAttention cannot be compiled here (no AVX2, no C++ compiler, a stance).
        """
        attend(operands, call.shape, lists, out)


def _kind(operands: Operands) -> Hashable:
    return compile_key(operands.device, operands.q.dtype, operands.q.shape[3])


def attend(operands: Operands, shape: BlockShape, lists: BlockLists, out: Tensor) -> None:
    """:meth:`Flex.attend`: fused, or else a few hundred rows at a time."""
    tiles = _tiles(operands.q.dtype, shape)
    if max(operands.q_len, operands.k_len) <= min(tiles):
        # One block: it is live, or its rows would have no key. FlexAttention would compile this length on its own.
        out.copy_(dense_attention(operands))
        return
    reason = _uncompilable.get(_kind(operands), "")
    if not reason:
        try:
            _attend_fused(operands, tiles, _cut(operands, lists, shape, tiles), out)
            if not (operands.q.sum(dtype=torch.float32) + operands.k.sum(dtype=torch.float32)).isfinite():
                _repair(operands, shape, live_of(lists), out)
            return
        except NotCompiledError as error:
            reason = str(error)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = _uncompilable[_kind(operands)] = " ".join(str(error).split())
    warnings.warn(f"FlexAttention runs as masked dense attention: {reason}", UnfusedAttentionWarning, stacklevel=2)
    _attend_by_rows(operands, shape, live_of(lists), out)


def _cut(operands: Operands, lists: BlockLists, shape: BlockShape, tiles: BlockShape) -> BlockLists:
    """The same lists over smaller blocks, those that no row sees dropped; tiles divide blocks."""
    if tiles == shape:
        return lists
    grid, live = operands.grid(tiles), live_of(lists)
    for dim, block, tile, count in ((2, shape.q, tiles.q, grid.count_q), (3, shape.k, tiles.k, grid.count_k)):
        live = live.repeat_interleave(block // tile, dim).narrow(dim, 0, count)
    visible, whole = operands.mask.visibility(grid, live.device)
    return lists_of(live & visible, whole)


def _attend_fused(operands: Operands, tiles: BlockShape, lists: BlockLists, out: Tensor) -> None:
    """FlexAttention, one batch element at a time."""
    # k and v are read once per query block: contiguous rows pay for the copy. q keeps the layout of the output.
    k, v = operands.k.contiguous(), operands.v.contiguous()
    q = operands.q.transpose(1, 2).contiguous().transpose(1, 2)
    with (
        torch.no_grad(),  # Dynamo compiles again when the caller's grad mode differs.
        # Every kind of call is worth its compilation, whatever the process has compiled before. Duck shapes
        # would tie sizes that happen to be equal on the first call (N == H * D) and compile again later.
        torch._dynamo.config.patch(
            recompile_limit=2**30,
            accumulated_recompile_limit=2**30,
            suppress_errors=False,
            error_on_recompile=False,
        ),
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        for i in range(q.shape[0]):
            one = Operands(q[i], k[i], v[i], operands.mask, operands.scale)
            out[i] = _attend_one(one, tiles, BlockLists(*(x[i] for x in lists)))


def _attend_one(operands: Operands, tiles: BlockShape, lists: BlockLists) -> Tensor:
    """FlexAttention on one batch element.

    Each key head becomes an element of FlexAttention's batch, since FlexAttention compiles the number of its heads
    in: ``q [H, N, D]`` goes in as ``[H_kv, groups, N, D]``, a view.

    Args:
        operands: ``q [H, q_len, D]``, ``k, v [H_kv, k_len, D]``.
        tiles: rows of queries and of keys per block.
        lists: ``[H, ...]`` over the tiles, at least two of each.

    Returns:
        ``[H, q_len, D]``.
    """
    q, k, v, mask = operands.q, operands.k, operands.v, operands.mask
    q_len, k_len, split = q.shape[1], k.shape[1], (k.shape[0], q.shape[0] // k.shape[0])
    if mask.hides_nothing:  # FlexAttention itself knows where the keys end
        mask, lists = COMMONEST, BlockLists(lists.counts, torch.zeros_like(lists.partial), lists.indices)
    # Copies: Dynamo compiles again for views of something else.
    whole, partial, indices = (x.unflatten(0, split).clone() for x in lists)
    place = torch.arange(indices.shape[-1], device=indices.device) + whole[..., None]
    block_mask = BlockMask.from_kv_blocks(
        partial,
        indices.gather(-1, place.clamp_max(indices.shape[-1] - 1)),
        whole,
        indices,
        BLOCK_SIZE=tiles,
        mask_mod=_mask_mod(mask, mask.offset(q_len, k_len)),
        seq_lengths=(q_len, k_len),
        compute_q_blocks=False,
    )
    return _compiled()(q.unflatten(0, split), k[:, None], v[:, None], block_mask, operands.scale).flatten(0, 1)


def _rows(operands: Operands, shape: BlockShape, live: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some query rows at a time, and what they attend, bool ``[B, H, rows, k_len]``."""
    keys = torch.arange(operands.k_len, device=operands.device)
    offset = operands.mask.offset(operands.q_len, operands.k_len)
    for some in chunks(operands.q_len, ROWS_AT_ONCE):
        rows = torch.arange(some.start, some.stop, device=operands.device)
        attended = live[:, :, rows // shape.q].repeat_interleave(shape.k, 3)[..., : operands.k_len]
        yield some, attended & operands.mask.sees(rows[:, None] + offset, keys)


def _attend_by_rows(operands: Operands, shape: BlockShape, live: Tensor, out: Tensor) -> None:
    """Dense attention under the mask, a few hundred query rows at a time."""
    for rows, attended in _rows(operands, shape, live):
        out[:, :, rows] = F.scaled_dot_product_attention(
            operands.q[:, :, rows], operands.k, operands.v, attn_mask=attended, scale=operands.scale, enable_gqa=True
        )


def _repair(operands: Operands, shape: BlockShape, live: Tensor, out: Tensor) -> None:
    """Compute again, in place, the rows that may have met infinite or NaN scores.

    FlexAttention's running maximum passes over NaN: such rows come out as zeros, or as if some keys were not there.
    """
    q = operands.q
    k, v = (x.repeat_interleave(operands.groups, 1) for x in (operands.k, operands.v))
    flawed = ~k.isfinite().all(-1)
    for rows, attended in _rows(operands, shape, live):
        affected = ~q[:, :, rows].isfinite().all(-1) | (attended & flawed[:, :, None]).any(-1)
        if not affected.any():
            continue
        scores = (q[:, :, rows].float() @ k.float().mT * operands.scale).masked_fill(~attended, -torch.inf)
        exact = (scores.softmax(-1) @ v.float()).to(out.dtype)
        out[:, :, rows] = torch.where(affected[..., None], exact, out[:, :, rows])
