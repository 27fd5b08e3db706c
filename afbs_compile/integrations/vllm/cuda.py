"""vLLM's FlashAttention backend with long requests sparse."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from afbs_compile.integrations.vllm.attention import SplitBuilder, SplitImpl
from afbs_compile.integrations.vllm.paged import Order, Pages


class Builder(SplitBuilder, FlashAttentionMetadataBuilder):
    """Metadata for CUDA."""

    # A graph of a mixed batch would be replayed without looking for long requests: those batches run piecewise.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class Impl(SplitImpl, FlashAttentionImpl):
    """Attention on CUDA."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        config = get_current_vllm_config_or_none()
        self._longest = 0 if config is None else config.model_config.max_model_len

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See vLLM's ``AttentionImpl``."""
        if attn_metadata is None:
            # vLLM measures here what a step needs; it must see what one long request is gathered into.
            key.new_empty(2, self._longest, *key.shape[1:])
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def pages(self, layer: Any, kv_cache: Tensor) -> Pages | None:
        """The layer's cache, ``[pages, H_kv, tokens, 2 D]``, of which each token has its key before its value."""
        k, v = kv_cache.split(self.head_size, -1)
        return Pages(k, v, Order("rows"), Order("rows"))


class Backend(FlashAttentionBackend):
    """As ``CUSTOM``; its name stays FlashAttention's, so that vLLM treats it as that elsewhere."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """See vLLM's ``AttentionBackend``."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """See vLLM's ``AttentionBackend``."""
        return Builder
