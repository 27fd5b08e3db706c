"""Hand a graph to inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from afbs_compile.kernels.op import sparse_attention
from afbs_compile.kernels.shared_op import shared_attention
from afbs_compile.version import __version__


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None) -> Callable[..., Any]:
    """Compile a graph with inductor, inside a Dynamo backend.

    Args:
        gm: the graph, before AOTAutograd.
        example_inputs: values or fake values of its placeholders.
        mode: as in ``torch.compile(mode=...)``, e.g. ``"reduce-overhead"``; None is inductor's default.

    Raises:
        ValueError: inductor has no such mode.
    """
    from torch._inductor.compile_fx import compile_fx  # takes a second to import

    config: Any = torch.compiler.config  # its `patch` is installed at run time
    with config.patch(cache_key_tag=_cache_key_tag()):
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=_patches(mode))
    return cast(Callable[..., Any], compiled)


def _cache_key_tag() -> str:
    """What inductor's cache on disk must know beside the graph.

    Its keys hold the operator's name, but its compiled code every argument of the operator and the strides of its
    results: another version of this package must not find it.
    """
    schemas = [op._opoverload._schema for op in (sparse_attention, shared_attention)]
    return f"{torch.compiler.config.cache_key_tag} afbs_compile {__version__} {schemas}"


def _patches(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    modes: dict[str, dict[str, Any]] = list_mode_options()
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r}; inductor has {', '.join(sorted(modes))}")
    return dict(modes[mode])
