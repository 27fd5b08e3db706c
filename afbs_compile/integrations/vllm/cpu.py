"""vLLM's CPU backend with long requests sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from afbs_compile.integrations.vllm.attention import SplitBuilder, SplitImpl
from afbs_compile.integrations.vllm.paged import DIGIT, Order, Pages


class Builder(SplitBuilder, CPUAttentionMetadataBuilder):
    """Metadata for the CPU."""


class Impl(SplitImpl, CPUAttentionBackendImpl):
    """Attention on the CPU."""

    _orders: tuple[Order, Order] | None = None
    _looked = False

    def pages(self, layer: Any, kv_cache: Tensor) -> Pages | None:
        """The layer's cache, ``[pages, H_kv, tokens, 2 D]``, of which each page has its keys before its values."""
        if not self._looked:
            self._orders, self._looked = self._found_orders(layer, kv_cache), True
        return None if self._orders is None else Pages(*_halves(kv_cache), *self._orders)

    def _found_orders(self, layer: Any, kv_cache: Tensor) -> tuple[Order, Order] | None:
        """How the kernels of this CPU lay out a page, from what they make of numbers that are written into one."""
        _, heads, tokens, width = kv_cache.shape
        token = torch.arange(tokens)[:, None, None].expand(tokens, heads, width // 2)
        dim = torch.arange(width // 2).expand_as(token)
        scratch = kv_cache.new_zeros(1, *kv_cache.shape[1:])
        written = []
        for number in (token // DIGIT, token % DIGIT, dim // DIGIT, dim % DIGIT):
            given = number.to(kv_cache.dtype).contiguous()
            self.do_kv_cache_update(layer, given, given, scratch, torch.arange(tokens))
            written.append([half[0, 0].clone() for half in _halves(scratch)])
        k, v = (Order.of(list(pages)) for pages in zip(*written, strict=True))
        return None if k is None or v is None else (k, v)


class Backend(CPUAttentionBackend):
    """In place of ``CPU_ATTN``, and under its name."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """See vLLM's ``AttentionBackend``."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """See vLLM's ``AttentionBackend``."""
        return Builder


def _halves(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each page, ``[pages, H_kv, tokens, D]``, whose elements lie in whatever order."""
    pages, heads, tokens, width = kv_cache.shape
    k, v = kv_cache.view(pages, heads, 2 * tokens, width // 2).chunk(2, 2)
    return k, v
