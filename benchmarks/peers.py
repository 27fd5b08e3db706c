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

from afbs_compile.kernels.predict import BlockLists, lists_to_mask, mask_to_lists
from afbs_compile.kernels.reference import diagonal_blocks

Peer = Callable[[], Tensor] | str


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Callable[[], Tensor]:
    """PyTorch's default on this device."""
    return lambda: F.scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
    )


def dense_peers(q: Tensor, k: Tensor, v: Tensor, case: Case) -> dict[str, Peer]:
    """Dense attention by other backends and packages."""

    def torch_flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return dense_sdpa(q, k, v, case)()

    if q.device.type != "cuda":
        return {}
    return {
        "torch flash": torch_flash,
        "flash_attn 2": _package_call("flash_attn", "flash_attn_func", q, k, v, causal=case.causal),
        "flash_attn 4": _package_call("flash_attn.cute", "flash_attn_func", q, k, v, causal=case.causal),
    }


def sparse_peers(q: Tensor, k: Tensor, v: Tensor, case: Case, lists: BlockLists) -> dict[str, Peer]:
    """Attention over the same live 128 x 128 blocks, predictor not included; SpargeAttn brings its own."""
    peers: dict[str, Peer] = {"flex_attention": _flex(q, k, v, case, lists)}
    if q.device.type == "cuda":
        peers["flash_attn 4 block-sparse"] = _flash_attn_4(q, k, v, case, lists)
        peers["SpargeAttn, predictor included"] = _sparge(q, k, v, case)
    return peers


def _causal(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
    return row >= col


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, case: Case, lists: BlockLists) -> Peer:
    full = lists
    count = lists.indices.shape[-1]
    partial = BlockLists(torch.zeros_like(lists.counts), torch.zeros_like(lists.indices))
    if case.causal:
        live = lists_to_mask(lists, count)
        masked = live & diagonal_blocks(lists.indices.shape[-2], count, 128, 128, q.device)
        partial, full = mask_to_lists(masked), mask_to_lists(live & ~masked)
    mask = BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=(128, 128), mask_mod=_causal, seq_lengths=(case.length,) * 2, compute_q_blocks=False
    )
    return lambda: _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, case: Case, lists: BlockLists) -> Peer:
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    except ImportError:
        return "not installed"
    if case.causal:
        return "its blocks on the diagonal need a mask written in CuTe"
    none = torch.zeros_like(lists.counts), torch.zeros_like(lists.indices)
    blocks = BlockSparseTensorsTorch(*none, lists.counts, lists.indices, block_size=(128, 128))
    return _package_call("flash_attn.cute", "flash_attn_func", q, k, v, block_sparse_tensors=blocks)


def _sparge(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Peer:
    try:
        from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda
    except ImportError:
        return "not installed"
    q, k, v = (x.contiguous() for x in (q, k, v))
    return lambda: spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=1 - case.sparsity, is_causal=case.causal)


def _package_call(package: str, name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Peer:
    """A function of the flash_attn family: operands and result are ``[B, N, H, D]``."""
    try:
        function = getattr(__import__(package, fromlist=[name]), name)
    except (ImportError, AttributeError):
        return "not installed"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        out = function(q, k, v, **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call
