"""What was compiled, given what ``torch.compile`` returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.resume_execution import ContinueExecutionCache

from afbs_compile.passes.place import owner_of
from afbs_compile.report import registry


def original_of(compiled: Any) -> Any:
    """What the user compiled: a module or a function.

    Raises:
        TypeError: the argument was not compiled.
    """
    original = getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", None)
    if original is None and isinstance(compiled, torch.nn.Module):
        # module.compile() works in place, on a model or on its blocks
        parts = (getattr(part, "_compiled_call_impl", None) for part in compiled.modules())
        original = compiled if any(part is not None for part in parts) else None
    if original is None:
        raise TypeError(
            f"compiled_or_recipe: got {type(compiled).__name__}; accepted: a Recipe, what torch.compile returned, or a "
            'model with attn_implementation="afbs"'
        )
    return original


def graphs_compiled_of(compiled: Any) -> Sequence[registry.CompiledGraph]:
    """What is remembered of the graphs of what ``torch.compile`` returned.

    Raises:
        TypeError: it returned no such thing.
    """
    original = original_of(compiled)
    owner = owner_of(original)
    tensors = [*owner.parameters(), *owner.buffers()] if isinstance(owner, torch.nn.Module) else []
    return registry.graphs_of([owner, *tensors], _compile_ids(original))


def _compile_ids(original: Any) -> set[str]:
    """Dynamo's ids of what was compiled from a function and from what it resumes after graph breaks."""
    function = getattr(original, "forward", original)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return set()
    resumed = ContinueExecutionCache.cache[code].values() if code in ContinueExecutionCache.cache else ()
    entries = [entry for part in (code, *resumed) for entry in _debug_get_cache_entry_list(part)]
    return {f"{entry.compile_id.frame_id}_{entry.compile_id.frame_compile_id}" for entry in entries}
