"""What a backend of vLLM becomes: long requests sparse, the rest of a batch by the backend itself."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from afbs_compile.integrations.vllm.batch import Request, Split, long_requests
from afbs_compile.integrations.vllm.models import calls_of
from afbs_compile.integrations.vllm.paged import Pages
from afbs_compile.integrations.vllm.stats import STATS
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands

ATTRIBUTE = "afbs"
"""Of a backend's metadata: the :class:`~afbs_compile.integrations.vllm.batch.Split` of a step with long requests."""


class SplitBuilder:
    """Goes before a builder of vLLM's in the bases of a class: its metadata says which requests are long."""

    supports_update_block_table = False  # which would leave the split with the pages of other layers

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        from vllm.distributed import get_tensor_model_parallel_rank

        every = vllm_config.compilation_config.static_forward_context
        layers = {name: layer for name, layer in every.items() if isinstance(getattr(layer, "impl", None), SplitImpl)}
        self._calls = calls_of(layers, layer_names, get_tensor_model_parallel_rank())
        if self._calls is not None:
            self._calls.warm(layers, vllm_config.model_config.dtype, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See vLLM's ``AttentionMetadataBuilder``."""
        build: Any = super().build  # type: ignore[misc]
        metadata = build(common_prefix_len, common_attn_metadata, fast_build)
        least = None if self._calls is None else self._calls.least_work
        long = () if least is None else long_requests(common_attn_metadata, least)
        if long:
            # Built fast: what a scheduler computes ahead is kept in one buffer, which the whole batch may need.
            split = Split(self._calls, long, common_attn_metadata, lambda common: build(0, common, True))
            setattr(metadata, ATTRIBUTE, split)
        return metadata


class SplitImpl:
    """Goes before an implementation of vLLM's in the bases of a class."""

    def pages(self, layer: Any, kv_cache: Tensor) -> Pages | None:
        """The layer's cache, ``None`` where it cannot be read: what a backend has to say."""
        raise NotImplementedError

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
        """See vLLM's ``AttentionImpl``: tensors are ``[tokens, heads, D]``, and ``output`` is written into."""
        theirs: Any = super().forward  # type: ignore[misc]
        split: Split | None = getattr(attn_metadata, ATTRIBUTE, None)
        taken: set[int] = set()
        if split is not None and output_scale is None and output_block_scale is None:
            taken = self._sparse(split, layer, query, key, value, kv_cache, output)
        if not taken:
            everything: Tensor = theirs(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return everything
        assert split is not None
        rest = split.without(taken)
        if rest is not None:
            STATS.rest += 1
            metadata, rows = rest
            part = output.new_empty(len(rows), *output.shape[1:])
            theirs(layer, query[rows], key[rows], value[rows], kv_cache, metadata, part)
            output[rows] = part
        return output

    def _sparse(
        self, split: Split, layer: Any, q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, output: Tensor
    ) -> set[int]:
        """Compute the long requests that are sparse in this layer; which ones these were."""
        mine = [request for request in split.long if split.calls.takes(layer.layer_name, request.rows, request.keys)]
        pages = self.pages(layer, kv_cache) if mine and self._is_plain(layer, q, k) else None
        done = set()
        if pages is not None:
            for request in mine:
                operands = functools.partial(self._operands, split, request, layer, q, k, v, pages)
                out = split.calls.attend(layer.layer_name, operands)
                if out is None:
                    break  # the layer is dense, or this request: vLLM takes what is left
                output[request.first_row : request.first_row + request.rows] = out[0].transpose(0, 1)
                done.add(request.place)
        STATS.sparse += len(done)
        STATS.dense += len(split.long) - len(done)
        return done

    def _is_plain(self, layer: Any, q: Tensor, k: Tensor | None) -> bool:
        """Whether the layer computes what a recipe speaks of, on keys that it has written itself."""
        impl: Any = self
        return (
            impl.alibi_slopes is None
            and impl.kv_sharing_target_layer_name is None
            and layer.attn_type == "decoder"
            and layer.head_size_v == layer.head_size
            and k is not None
            and k.dtype == q.dtype == layer.kv_cache.dtype
        )

    def _operands(
        self, split: Split, request: Request, layer: Any, q: Tensor, k: Tensor, v: Tensor, pages: Pages
    ) -> Operands:
        impl: Any = self
        rows = slice(request.first_row, request.first_row + request.rows)
        window: int | None = layer.sliding_window
        table = split.common.block_table_tensor[request.place]
        keys, values = pages.gathered(table, request.keys - request.rows, k[rows], v[rows], window)
        mask = mask_of("causal_end" if window is None else f"window({window})")
        queries = q[rows].transpose(0, 1)[None]
        cap = float(impl.logits_soft_cap or 0.0)
        return Operands(queries, keys, values, mask, impl.scale, softcap=cap, sinks=impl.sinks)
