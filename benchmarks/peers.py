"""Other people's attention: each peer is a call ready to be timed, or a sentence on why it is not here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.operands import Operands

Peer = Callable[[], Tensor] | str

SHAPE = BlockShape(128, 128)
"""Of the sparse peers."""


def dense_sdpa(operands: Operands) -> Callable[[], Tensor]:
    """PyTorch's default on this device."""
    q, k, v = operands.q, operands.k, operands.v
    mask = operands.mask.sdpa_arguments(operands.q_len, operands.k_len, operands.device)
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=operands.groups > 1, **mask)


def dense_peers(operands: Operands, case: Case) -> dict[str, Peer]:
    """Dense attention by other backends and packages."""

    def torch_flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return dense_sdpa(operands)()

    if operands.device.type != "cuda":
        return {}
    return {
        "torch flash": torch_flash,
        "flash_attn 2": _package_call("flash_attn", "flash_attn_func", operands, causal=case.mask == "causal"),
        "flash_attn 4": _package_call("flash_attn.cute", "flash_attn_func", operands, causal=case.mask == "causal"),
    }


def sparse_peers(operands: Operands, case: Case, lists: BlockLists) -> dict[str, Peer]:
    """Attention over the same live blocks of :data:`SHAPE`, predictor not included; SpargeAttn brings its own."""
    peers: dict[str, Peer] = {"flex_attention": _flex(operands, lists)}
    if operands.device.type == "cuda":
        peers["flash_attn 4 block-sparse"] = _flash_attn_4(operands, case, lists)
        peers["SpargeAttn, predictor included"] = _sparge(operands, case)
    return peers


def _causal(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
    return row >= col


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _flex(operands: Operands, lists: BlockLists) -> Peer:
    whole, partial, indices = lists
    place = torch.arange(indices.shape[-1], device=indices.device) + whole[..., None]
    mask = BlockMask.from_kv_blocks(
        partial,
        indices.gather(-1, place.clamp_max(indices.shape[-1] - 1)),
        whole,
        indices,
        BLOCK_SIZE=SHAPE,
        mask_mod=_causal,
        seq_lengths=(operands.q_len, operands.k_len),
        compute_q_blocks=False,
    )
    q, k, v, gqa = operands.q, operands.k, operands.v, operands.groups > 1
    return lambda: _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=gqa)


def _flash_attn_4(operands: Operands, case: Case, lists: BlockLists) -> Peer:
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    except ImportError:
        return "not installed"
    if case.mask == "causal":
        return "its blocks on the diagonal need a mask written in CuTe"
    none = torch.zeros_like(lists.counts), torch.zeros_like(lists.indices)
    blocks = BlockSparseTensorsTorch(*none, lists.counts, lists.indices, block_size=SHAPE)
    return _package_call("flash_attn.cute", "flash_attn_func", operands, block_sparse_tensors=blocks)


def _sparge(operands: Operands, case: Case) -> Peer:
    try:
        from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda
    except ImportError:
        return "not installed"
    q, k, v = (x.contiguous() for x in (operands.q, operands.k, operands.v))
    return lambda: spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=1 - case.sparsity, is_causal=case.mask == "causal")


def _package_call(package: str, name: str, operands: Operands, **options: Any) -> Peer:
    """A function of the flash_attn family: operands and result are ``[B, N, H, D]``."""
    try:
        function = getattr(__import__(package, fromlist=[name]), name)
    except (ImportError, AttributeError):
        return "not installed"
    q, k, v = (x.transpose(1, 2) for x in (operands.q, operands.k, operands.v))

    def call() -> Tensor:
        out = function(q, k, v, **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call
