"""Digests that tell whether a recipe belongs to a graph, its weights and its samples."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WORDS_AT_ONCE = 2**22
"""Eight-byte words of a tensor that enter its checksum in one step."""


def placeholders(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, Any]]:
    """The placeholders of a graph with their values."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return zip(nodes, example_inputs, strict=True)


def belongs_to_module(node: fx.Node, value: Any) -> bool:
    """Whether a placeholder is a parameter, buffer or attribute of the module rather than an argument of the call.

    Dynamo names a placeholder after where its value came from: ``L_input_ids_`` or ``L_kwargs_input_ids_`` for
    arguments, ``L_self_...`` and ``..._buffers_...`` for what a module holds.
    """
    name = str(node.target)
    owned = isinstance(value, torch.nn.Parameter) or re.match(r"L_+self_", name) is not None
    return isinstance(value, Tensor) and (owned or re.search(r"_(buffers|parameters)_", name) is not None)


def module_tensors(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Named parameters and buffers of a graph in graph order, lifted to its inputs or attributes of its module."""
    lifted = [(n.name, value) for n, value in placeholders(gm, example_inputs) if belongs_to_module(n, value)]
    return [*lifted, *gm.named_parameters(), *gm.named_buffers()]


def plain_name(name: str) -> str:
    """Where a tensor stands, ``_model_layers_0_self_attn_q_proj_weight_``, by its name or the one Dynamo gives it."""
    path = re.sub(r"_(modules|parameters|buffers)(?=_)|\.", "_", f"_{name}_")
    return re.sub(r"_+", "_", path)


def graph_digest(site_names: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of which attention calls a graph has and of its tensors' names and shapes; lengths do not enter."""
    content = [list(site_names), [(name, list(tensor.shape)) for name, tensor in tensors]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def source_digest(nodes: Iterable[fx.Node]) -> str:
    """Digest of the lines of code that led to some nodes, without files and line numbers.

    It tells apart graphs that have the same calls by name: two functions, or two parts of one broken graph.
    """
    traces = [re.sub(r'File ".*", line \d+', "", node.meta.get("stack_trace") or "") for node in nodes]
    return hashlib.sha256(json.dumps(traces).encode()).hexdigest()


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Digest of dtypes, shapes and values.

    The values enter by a checksum that runs on the tensor's device and depends on every byte and its place: sending
    a large model through SHA-256 would take longer than calibrating it.
    """
    return digest_of(map(described, tensors))


def digest_of(descriptions: Iterable[str]) -> str:
    """Digest of tensors by what :func:`described` says of each."""
    return hashlib.sha256("".join(descriptions).encode()).hexdigest()


def described(tensor: Tensor) -> str:
    """The dtype, shape and content of a tensor, in few characters."""
    return f"{tensor.dtype}{list(tensor.shape)}{_content(tensor)}"


def _content(tensor: Any) -> str:
    """What a tensor holds: a checksum or, of one that is made of others (quantised, a shard), theirs."""
    if tensor.is_meta:
        return "meta"
    if not is_traceable_wrapper_subclass(tensor):
        return str(_checksum(tensor))
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return f"{type(tensor).__name__}{tensor_digest(part for part in parts if isinstance(part, Tensor))}"


def _checksum(tensor: Tensor) -> int:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)) if raw.numel() % 8 else raw
    words = (raw.clone() if raw.storage_offset() % 8 else raw).view(torch.int64)
    total = 0
    for start in range(0, words.numel(), WORDS_AT_ONCE):
        part = words[start : start + WORDS_AT_ONCE]
        # sum of word * (2 * place + 1) modulo 2^64: an odd factor loses no bit of the word
        factors = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=words.device)
        total = (total + int((part * factors).sum())) % 2**64
    return total
