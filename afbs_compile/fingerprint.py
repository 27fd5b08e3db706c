"""Digests that tell whether a recipe belongs to a graph, its weights and its samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

STRIDED_SAMPLE = 4096
"""Bytes of each tensor, evenly spread, whose place matters to its digest; a checksum covers all of them."""


def parameters_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Named parameters of a graph in graph order, whether they are inputs of the graph or attributes of its module."""
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    lifted: list[tuple[str, Tensor]] = [
        (name, value)
        for name, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, torch.nn.Parameter)
    ]
    return [*lifted, *gm.named_parameters()]


def graph_digest(site_names: Iterable[str], parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of which attention calls a graph has and of its parameters' names and shapes; lengths do not enter."""
    content = [list(site_names), [(name, list(tensor.shape)) for name, tensor in parameters]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Digest of dtypes, shapes and values.

    Every byte enters an order-free checksum that runs on the tensor's device; an evenly spread sample enters in
    order. Hashing all the bytes of a large model in order would take longer than calibrating it.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        # The checksum wants words; what does not fill one, or is not aligned to one, is hashed as bytes or copied.
        words = raw[: raw.numel() // 8 * 8]
        words = words.clone() if words.storage_offset() % 8 else words
        if words.numel():
            checksum = torch.hash_tensor(words.view(torch.int64))
            digest.update(str(checksum.view(torch.int64).item()).encode())
        digest.update(_bytes(raw[raw.numel() // 8 * 8 :]))
        digest.update(_bytes(raw[:: max(1, raw.numel() // STRIDED_SAMPLE)]))
    return digest.hexdigest()


def _bytes(raw: Tensor) -> bytes:
    return raw.cpu().numpy().tobytes()
