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
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._dynamo.exc
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.flex.symbols import tile_symbols_apart
from afbs_compile.kernels.attend.machine import compile_key
from afbs_compile.kernels.blocks import BlockLists, BlockShape, chunks, lists_of, live_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.compilations import forget_compilations, note_compilation
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.operands import LARGEST_SCORE, Operands
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.sight import (
    ROWS_AT_ONCE,
    allowed_by_rows,
    changed,
    product,
    resolved,
    sight_of,
    weights,
)

LARGEST_TILE = {torch.float32: 128, torch.bfloat16: 64, torch.float16: 64}
"""Rows per block handed to FlexAttention; larger blocks are cut. On the CPU 128 x 128 takes 6 to 28 % less time than
64 x 64 in fp32. In bf16 the two are within noise of each other, and 128 x 128 was once seen to be ten times slower."""

COMMONEST = Causal()
"""What a call without partial blocks is compiled with, for its mask is not looked at: no kernel of its own."""


class UnfusedAttentionWarning(UserWarning):
    """FlexAttention cannot be compiled here; a correct but slower path runs."""


class NotCompiledError(RuntimeError):
    """FlexAttention was about to run eagerly."""


class _Rules(NamedTuple):
    """What becomes of scores inside FlexAttention, for one batch element.

    Attributes:
        mask: the formula. offset: 0-d int64, position of row 0; ``None`` for 0.
        valid: bool ``[k_len]``. attn_mask: bool or floating ``[H_kv, groups, q_len, k_len]``, any strides.
        softcap: 0 for none.
    """

    mask: Mask
    offset: Tensor | None
    valid: Tensor | None
    attn_mask: Tensor | None
    softcap: float


def _mask_mod(rules: _Rules) -> Callable[..., Tensor]:
    """What a row sees inside partial blocks."""

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = rules.mask.sees(row if rules.offset is None else row + rules.offset, key)
        if rules.valid is not None:
            seen = seen & rules.valid[key]
        if rules.attn_mask is not None and rules.attn_mask.dtype == torch.bool:
            seen = seen & rules.attn_mask[batch, head, row, key]
        return seen

    return sees


def _score_mod(rules: _Rules) -> Callable[..., Tensor] | None:
    """What becomes of a score; ``None`` where it stays as it is."""
    bias = rules.attn_mask if rules.attn_mask is not None and rules.attn_mask.dtype != torch.bool else None
    if bias is None and not rules.softcap:
        return None

    def changes(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if rules.softcap:
            score = rules.softcap * torch.tanh(score / rules.softcap)
        return score if bias is None else score + bias[batch, head, row, key]

    return changes


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: BlockLists,
    tiles: BlockShape,
    rules: _Rules,
    scale: float,
) -> Tensor:
    """Body of the compiled function; ``lists`` are over the tiles."""
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiledError("torch.compile did not compile it (a stance, or TORCHDYNAMO_DISABLE)")
    place = torch.arange(lists.indices.shape[-1], device=lists.indices.device) + lists.whole[..., None]
    block_mask = BlockMask.from_kv_blocks(
        lists.partial,
        lists.indices.gather(-1, place.clamp_max(lists.indices.shape[-1] - 1)),
        lists.whole,
        lists.indices,
        BLOCK_SIZE=tiles.rows,
        mask_mod=_mask_mod(rules),
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    return flex_attention(
        query, key, value, score_mod=_score_mod(rules), block_mask=block_mask, scale=scale, enable_gqa=True
    )


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
    operands = resolved(operands)
    tame = _is_tame(operands)
    if not tame:
        operands = _cleaned(operands)
        tame = _is_tame(operands)
    if not _try_fused(operands, shape, lists, out):
        _attend_by_rows(operands, shape, live_of(lists), out)
    if not tame:
        _repair(operands, shape, live_of(lists), out)


def _try_fused(operands: Operands, shape: BlockShape, lists: BlockLists, out: Tensor) -> bool:
    """Compute by FlexAttention where it can; false where it cannot.

    Warns:
        UnfusedAttentionWarning: it should have, but cannot be compiled.
    """
    tiles = _tiles(operands.q.dtype, shape)
    if max(operands.q_len, operands.k_len) <= min(tiles.rows) or operands.sinks is not None:
        return False  # FlexAttention would compile a length of one block on its own, and has no place for sinks.
    reason = _uncompilable.get(_kind(operands), "")
    if not reason:
        try:
            _attend_fused(operands, tiles, _cut(operands, lists, shape, tiles), out)
            return True
        except NotCompiledError as error:
            reason = str(error)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = _uncompilable[_kind(operands)] = " ".join(str(error).split())
    warnings.warn(f"FlexAttention runs as masked dense attention: {reason}", UnfusedAttentionWarning, stacklevel=3)
    return False


def _is_tame(operands: Operands) -> bool:
    """Whether everything is finite, and no score can leave fp32 on its way."""
    q, k = (float(x.abs().amax()) if x.numel() else 0.0 for x in (operands.q, operands.k))
    score = q * k * operands.q.shape[3] * max(1.0, abs(operands.scale))  # NaN where one of them is
    return score < LARGEST_SCORE and bool(operands.v.sum(dtype=torch.float32).isfinite())


def _cleaned(operands: Operands) -> Operands:
    """The same call with zeros in place of keys that are not valid."""
    if operands.valid is None:
        return operands
    away = ~operands.valid[:, None, :, None]
    return replace(operands, k=operands.k.masked_fill(away, 0.0), v=operands.v.masked_fill(away, 0.0))


def _cut(operands: Operands, lists: BlockLists, shape: BlockShape, tiles: BlockShape) -> BlockLists:
    """The same lists over smaller blocks, those that no row sees dropped; tiles divide blocks."""
    if tiles.rows == shape.rows:
        return lists
    grid, live = operands.grid(tiles), live_of(lists)
    for dim, block, tile, count in ((2, shape.q, tiles.q, grid.count_q), (3, shape.k, tiles.k, grid.count_k)):
        live = live.repeat_interleave(block // tile, dim).narrow(dim, 0, count)
    sight = sight_of(operands, tiles)
    return lists_of(live & sight.visible, sight.whole)


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
            specialize_float=True,  # a cap is part of the kernel
        ),
        torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        tile_symbols_apart(),
    ):
        for i in range(q.shape[0]):
            one = replace(operands.element(i), q=q[i : i + 1], k=k[i : i + 1], v=v[i : i + 1])
            out[i] = _attend_one(one, tiles, BlockLists(*(x[i] for x in lists)))


def _attend_one(operands: Operands, tiles: BlockShape, lists: BlockLists) -> Tensor:
    """FlexAttention on one batch element.

    Each key head becomes an element of FlexAttention's batch, since FlexAttention compiles the number of its heads
    in: ``q [H, N, D]`` goes in as ``[H_kv, groups, N, D]``, a view.

    Args:
        operands: batch size 1; tiles: rows of queries and of keys per block.
        lists: ``[H, ...]`` over the tiles, at least two of each.

    Returns:
        ``[H, q_len, D]``.
    """
    q, k, v, mask = operands.q[0], operands.k[0], operands.v[0], operands.mask
    split = (k.shape[0], operands.groups)
    if mask.hides_nothing and operands.by_formula:  # FlexAttention itself knows where the keys end
        mask, lists = COMMONEST, BlockLists(lists.counts, torch.zeros_like(lists.partial), lists.indices)
    given = operands.attn_mask
    if given is not None:
        given = given[0].expand(q.shape[0], q.shape[1], k.shape[1]).unflatten(0, split)
    rules = _Rules(
        mask,
        torch.tensor(operands.offset, device=q.device) if operands.offset else None,
        None if operands.valid is None else operands.valid[0],
        given,
        operands.softcap,
    )
    # Copies: Dynamo compiles again for views of something else.
    parts = BlockLists(*(x.unflatten(0, split).clone() for x in lists))
    out = _compiled()(q.unflatten(0, split), k[:, None], v[:, None], parts, tiles, rules, operands.scale)
    return out.flatten(0, 1)


def _rows(operands: Operands, shape: BlockShape, live: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some query rows at a time, and what they attend, bool ``[B, H, rows, k_len]``."""
    for some in chunks(operands.q_len, ROWS_AT_ONCE):
        rows = torch.arange(some.start, some.stop, device=operands.device)
        attended = live[:, :, rows // shape.q].repeat_interleave(shape.k, 3)[..., : operands.k_len]
        yield some, attended & allowed_by_rows(operands, some)


def _attend_by_rows(operands: Operands, shape: BlockShape, live: Tensor, out: Tensor) -> None:
    """Attention under the mask by its definition, a few hundred query rows at a time."""
    for rows, attended in _rows(operands, shape, live):
        if operands.is_plain:
            query = operands.q[:, :, rows]
            out[:, :, rows] = F.scaled_dot_product_attention(
                query, operands.k, operands.v, attn_mask=attended, scale=operands.scale, enable_gqa=True
            )
        else:
            out[:, :, rows] = _exact(operands, rows, attended)


def _exact(operands: Operands, rows: slice, attended: Tensor) -> Tensor:
    k, v = (x.float().repeat_interleave(operands.groups, 1) for x in (operands.k, operands.v))
    scores = changed(operands, operands.q[:, :, rows].float() @ k.mT * operands.scale, rows)
    mass = weights(scores.masked_fill(~attended, -torch.inf), operands.sinks)
    return product(mass, v).to(operands.q.dtype)


def _repair(operands: Operands, shape: BlockShape, live: Tensor, out: Tensor) -> None:
    """Compute again, in place, the rows that may have met what is infinite or NaN, scores that overflow included.

    FlexAttention's running maximum passes over NaN: such rows come out as zeros, or as if some keys were not there.
    What is not finite in a value reaches rows that do not see it, as NaN times zero.
    """
    q, groups = operands.q, operands.groups
    largest = operands.k.float().nan_to_num(0.0, 0.0, 0.0).abs().amax((2, 3)) * max(1.0, abs(operands.scale))
    largest = largest.repeat_interleave(groups, 1)[..., None]
    k_flawed, v_flawed = (~x.isfinite().all(-1).repeat_interleave(groups, 1) for x in (operands.k, operands.v))
    for rows, attended in _rows(operands, shape, live):
        touched = live[:, :, torch.arange(rows.start, rows.stop, device=q.device) // shape.q]
        touched = touched.repeat_interleave(shape.k, 3)[..., : operands.k_len]
        affected = ~(q[:, :, rows].float().abs().sum(-1) * largest < LARGEST_SCORE)
        affected |= (touched & (k_flawed | v_flawed)[:, :, None]).any(-1)
        if affected.any():
            out[:, :, rows] = torch.where(affected[..., None], _exact(operands, rows, attended), out[:, :, rows])
