"""Block-sparse attention on the CPU, and on devices without a kernel of ours, by compiled FlexAttention.

The rule is :func:`afbs_compile.kernels.reference.masked_attention` with every ``lam`` at ``LAMBDA_OFF``: this engine
skips no product with V, which is never less accurate.

FlexAttention is fast only when it is compiled. Eager, it holds an N x N tensor per head and is many times slower than
dense attention, and torch.compile falls back to eager silently (recompile limit, ``suppress_errors``, a stance,
``TORCHDYNAMO_DISABLE``). Here that cannot happen: :func:`_fused` refuses to run uncompiled, and :func:`attend` then
takes :func:`_attend_by_rows` and says why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
import torch._dynamo
import torch._dynamo.exc
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from afbs_compile.kernels.predict import mask_to_lists
from afbs_compile.kernels.reference import block_count, diagonal_blocks, visible_blocks

LARGEST_TILE = {torch.float32: 128, torch.bfloat16: 64, torch.float16: 64}
"""Rows per block handed to FlexAttention; larger blocks are cut. On the CPU 128 x 128 takes 6 to 28 % less time than
64 x 64 in fp32. In bf16 the two are within noise of each other, and 128 x 128 was once seen to be ten times slower."""

ROWS_AT_ONCE = 512
"""Query rows whose mask :func:`_attend_by_rows` holds at a time; a multiple of every block shape."""


class UnfusedAttentionWarning(UserWarning):
    """FlexAttention cannot be compiled here; a correct but slower path runs."""


class NotCompiledError(RuntimeError):
    """FlexAttention was about to run eagerly."""


def _causal(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """What a row may attend inside the blocks that are not computed whole."""
    return row >= col


def _fused(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Body of the compiled function."""
    if not torch.compiler.is_dynamo_compiling():
        raise NotCompiledError("torch.compile did not compile it (a stance, or TORCHDYNAMO_DISABLE)")
    return flex_attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The compiled function: one kernel for all lengths, key heads and masks.

    Another dtype, head_dim, scale or number of query heads per key head compiles again, and so does a single key head.
    """
    return torch.compile(_fused, dynamic=True, fullgraph=True)


@functools.cache
def _uncompilable() -> dict[tuple[str, torch.dtype, int], str]:
    """Why FlexAttention failed to compile, by device type, dtype and head_dim: it is not tried again."""
    return {}


def _tiles(dtype: torch.dtype, block_q: int, block_k: int) -> tuple[int, int]:
    """Rows of queries and of keys per block as FlexAttention is handed them."""
    return min(block_q, LARGEST_TILE[dtype]), min(block_k, LARGEST_TILE[dtype])


def choice(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int
) -> tuple[str, str | None]:
    """What :func:`attend` runs for a kind of call, e.g. ``"flex 64x64 tiles"``, and why it is not FlexAttention.

    It is taken to compile until it has failed to.
    """
    reason = _uncompilable().get((device.type, dtype, head_dim))
    if reason is not None:
        return "masked dense attention", f"FlexAttention cannot be compiled: {reason}"
    tiles = _tiles(dtype, block_q, block_k)
    return f"flex {tiles[0]}x{tiles[1]} tiles", None


def _cut(live: Tensor, length: int, blocks: tuple[int, int], tiles: tuple[int, int], causal: bool) -> Tensor:
    """The same mask over smaller blocks.

    Args:
        live: bool ``[B, H, n_q, n_k]`` over ``blocks``.
        length: rows that the blocks cover.
        blocks, tiles: rows of queries and of keys per block; tiles divide blocks.
        causal: whether tiles that no row may attend are dropped.

    Returns:
        bool ``[B, H, ceil(length / tiles[0]), ceil(length / tiles[1])]``.
    """
    if tiles == blocks:
        return live
    for dim, block, tile in zip((2, 3), blocks, tiles, strict=True):
        live = live.repeat_interleave(block // tile, dim).narrow(dim, 0, block_count(length, tile))
    count_q, count_k = live.shape[2:]
    return live & visible_blocks(count_q, count_k, *tiles, causal, live.device)


def _attend_one(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, tiles: tuple[int, int], causal: bool, scale: float
) -> Tensor:
    """FlexAttention on one batch element.

    Each key head becomes an element of FlexAttention's batch, since FlexAttention compiles the number of its heads
    in: ``q [H, N, D]`` goes in as ``[H_kv, groups, N, D]``, a view.

    Args:
        q: ``[H, N, D]``; k, v: ``[H_kv, N, D]``.
        live: bool ``[H, n_q, n_k]`` over ``tiles``, at least two of each.
        tiles: rows of queries and of keys per block.
        causal: as in :func:`attend`.
        scale: softmax scale.

    Returns:
        ``[H, N, D]``.
    """
    heads, length, _ = q.shape
    split = (k.shape[0], heads // k.shape[0])
    live = live.unflatten(0, split)
    partial = torch.zeros_like(live)
    if causal:
        count_q, count_k = live.shape[2:]
        partial = live & diagonal_blocks(count_q, count_k, *tiles, live.device)
    block_mask = BlockMask.from_kv_blocks(
        *mask_to_lists(partial),
        *mask_to_lists(live & ~partial),
        BLOCK_SIZE=tiles,
        mask_mod=_causal,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )
    return _compiled()(q.unflatten(0, split), k[:, None], v[:, None], block_mask, scale).flatten(0, 1)


def _attend_by_rows(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, blocks: tuple[int, int], causal: bool, scale: float
) -> Tensor:
    """Dense attention under the mask, a few hundred query rows at a time. Arguments as in :func:`attend`."""
    length, (block_q, block_k) = q.shape[2], blocks
    cols = torch.arange(length, device=q.device)
    parts = []
    for start in range(0, length, ROWS_AT_ONCE):
        rows = cols[start : start + ROWS_AT_ONCE]
        allowed = live[:, :, rows // block_q].repeat_interleave(block_k, 3)[..., :length]
        if causal:
            allowed = allowed & (cols <= rows[:, None])
        part = q[:, :, start : start + ROWS_AT_ONCE]
        parts.append(F.scaled_dot_product_attention(part, k, v, attn_mask=allowed, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2)


def _repair(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, live: Tensor, blocks: tuple[int, int], causal: bool, scale: float
) -> None:
    """Compute again, in place, the rows that may have met infinite or NaN scores.

    FlexAttention's running maximum passes over NaN: such rows come out as zeros, or as if some keys were not there.
    """
    length, (block_q, block_k) = q.shape[2], blocks
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    flawed = ~k.isfinite().all(-1)
    flawed_blocks = F.pad(flawed, (0, live.shape[3] * block_k - length)).unflatten(-1, (-1, block_k)).any(-1)
    met = (live & flawed_blocks[:, :, None]).any(-1).repeat_interleave(block_q, -1)[..., :length]
    if causal:
        met &= flawed.cumsum(-1) > 0
    affected = (~q.isfinite().all(-1) | met)[..., None]
    cols = torch.arange(length, device=q.device)
    for start in range(0, length, ROWS_AT_ONCE):
        rows = cols[start : start + ROWS_AT_ONCE]
        if not affected[:, :, rows].any():
            continue
        allowed = live[:, :, rows // block_q].repeat_interleave(block_k, 3)[..., :length]
        if causal:
            allowed = allowed & (cols <= rows[:, None])
        scores = (q[:, :, rows].float() @ k.float().mT * scale).masked_fill(~allowed, -torch.inf)
        exact = (scores.softmax(-1) @ v.float()).to(out.dtype)
        out[:, :, rows] = torch.where(affected[:, :, rows], exact, out[:, :, rows])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """Attention over the live blocks.

    The first call of a kind (dtype, head_dim, scale, query heads per key head) compiles for some seconds.

    Args:
        q: ``[B, H, N, D]`` fp16, bf16 or fp32; k, v: ``[B, H_kv, N, D]`` of the same dtype; any strides.
        live: bool ``[B, H, n_q, n_k]``, no block that is invisible under ``causal``, and at least one visible key for
            every row.
        causal: whether row r attends keys 0..r only.
        scale: softmax scale; ``None`` means ``D ** -0.5``.
        block_q, block_k: rows per block, powers of two; ``block_q`` is a multiple of ``block_k``.

    Returns:
        ``[B, H, N, D]`` in the dtype of ``q``; in memory ``[B, N, H, D]``.

    Warns:
        UnfusedAttentionWarning: FlexAttention cannot be compiled here (no AVX2, no C++ compiler, a stance).
    """
    batch, heads, length, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    tiles = _tiles(q.dtype, block_q, block_k)
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    kind = (q.device.type, q.dtype, dim)
    reason = _uncompilable().get(kind, "")
    if length <= min(tiles):
        # One block: it is live, or its rows would have no key. FlexAttention would compile this length on its own.
        return out.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True))
    if not reason:
        cut = _cut(live, length, (block_q, block_k), tiles, causal)
        # k and v are read once per query block: contiguous rows pay for the copy. q keeps the layout of the output.
        k_rows, v_rows = k.contiguous(), v.contiguous()
        q_rows = q.transpose(1, 2).contiguous().transpose(1, 2)
        try:
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
                for i in range(batch):
                    out[i] = _attend_one(q_rows[i], k_rows[i], v_rows[i], cut[i], tiles, causal, scale)
            if not (q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32)).isfinite():
                _repair(out, q, k, v, live, (block_q, block_k), causal, scale)
            return out
        except NotCompiledError as error:
            reason = str(error)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = _uncompilable()[kind] = " ".join(str(error).split())
    warnings.warn(f"FlexAttention runs as masked dense attention: {reason}", UnfusedAttentionWarning, stacklevel=2)
    return out.copy_(_attend_by_rows(q, k, v, live, (block_q, block_k), causal, scale))
