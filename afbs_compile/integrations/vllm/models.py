"""The attention calls of a vLLM model on one rank, and what a recipe says of them."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from afbs_compile.errors import AfbsError, RecipeError, first_line
from afbs_compile.integrations.served import ServedModel
from afbs_compile.integrations.vllm import RECIPE_VARIABLE
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import Operands
from afbs_compile.match import renamed_as
from afbs_compile.options import Options
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.shards import Heads, of_part
from afbs_compile.sketch import likeness, sketched

FAILURES = (AfbsError, ValueError, RuntimeError, OSError)
"""An engine's refusal, no memory, no compiler: the model is served all the same."""


class Calls:
    """The calls of one model that are sparse here, by the names of vLLM's attention layers.

    Args:
        served: that computes them; sites: what the recipe says of each on this rank, by the layer's name.
    """

    def __init__(self, served: ServedModel, sites: Mapping[str, SiteRecipe]) -> None:
        self._served = served
        self._sparse = {
            layer: (site.name, site.calibrated)
            for layer, site in sites.items()
            if site.outcome == "sparse" and not site.calibrated.is_dense
        }

    @property
    def least_work(self) -> int | None:
        """Rows times keys of the smallest request that any layer computes sparsely; ``None`` where none does."""
        return min((call.min_length**2 for _, call in self._sparse.values()), default=None)

    @property
    def count(self) -> int:
        """Layers that compute any request sparsely."""
        return len(self._sparse)

    def takes(self, layer: str, rows: int, keys: int) -> bool:
        """Whether a layer may compute a request sparsely."""
        found = self._sparse.get(layer)
        return found is not None and not found[1].dense_at(rows, keys)

    def attend(self, layer: str, operands: Callable[[], Operands]) -> Tensor | None:
        """The result of a call that :meth:`takes` says yes to, ``[1, H, rows, D]``; ``None``: it is for vLLM after all.

        A call whose thresholds do not hold on this form of the model, or that no engine takes, is dense from then on.
        """
        name, _ = self._sparse[layer]
        try:
            out = self._served.attend(name, operands())
        except FAILURES as error:
            del self._sparse[layer]
            _say(f"{name} stays dense: {first_line(error)}")
            return None
        if out is None and any(row.name == name and row.outcome != "sparse" for row in self._served.rows):
            del self._sparse[layer]
            _say(f"{name} stays dense: its thresholds do not hold on this form of the model.")
        return out

    @torch.inference_mode()
    def warm(self, layers: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        """Compile what the first long request would wait for; where nothing compiles, all stays dense."""
        if not self._sparse:
            return
        name, (_, call) = next(iter(self._sparse.items()))
        impl = layers[name].impl
        q, kv = (torch.zeros(1, n, 256, impl.head_size, dtype=dtype, device=device) for n in _heads(impl)[:2])
        try:
            run(Operands(q, kv, kv, mask_of("causal_end"), impl.scale), call.rounded())
        except FAILURES as error:
            self._sparse.clear()
            _say(f"attention stays dense: {first_line(error)}")


_known: weakref.WeakKeyDictionary[nn.Module, Calls | None] = weakref.WeakKeyDictionary()
"""By attention layer: vLLM hides its model from the garbage collector once it has started."""


def calls_of(layers: Mapping[str, Any], names: list[str], rank: int) -> Calls | None:
    """The calls of the model that some attention layers are part of, by the recipe that the environment names.

    A recipe that is damaged, or of another model or device, leaves all of them dense, with a sentence.

    Args:
        layers: of this process, by name, those whose attention may be sparse; names: of those that are asked for.
        rank: of this process among those that share the heads.
    """
    first = next((layers[name] for name in names if name in layers), None)
    if first is None:
        return None
    if first not in _known:
        path, root = os.environ.get(RECIPE_VARIABLE, ""), _root_of(first)
        mine = set(map(id, root.modules()))
        inside = {name: layer for name, layer in layers.items() if id(layer) in mine}
        calls = None
        try:
            calls = _calls(root, inside, Recipe.load(path), rank)
            _say(f"long prefills are sparse as recipe {path} says, in {calls.count} of {len(inside)} layers.")
        except AfbsError as error:
            _say(f"attention stays dense: {error}")
        _known.update((layer, calls) for layer in inside.values())
    return _known[first]


def _calls(root: nn.Module, layers: Mapping[str, Any], recipe: Recipe, rank: int) -> Calls:
    here = {name.rpartition(".")[0]: name for name in layers}  # vLLM's own layer stands inside the model's
    recorded = renamed_as(list(here), recipe)
    sites = {
        here[path]: of_part(path, site, Heads(*_heads(layers[here[path]].impl)), rank)
        for path, site in recorded.items()
    }
    sketches = tuple(sketch for graph in recipe.graphs for sketch in graph.tensors)
    shapes = {sketch.shape for sketch in sketches}
    held = weakref.ref(root)

    def tensors(inside: str = "") -> list[tuple[str, Tensor]]:
        """Those that vLLM keeps in the shape that they were saved in: not fused, packed or cut in parts."""
        alive = held()
        every = [] if alive is None else [*alive.named_parameters(), *alive.named_buffers()]
        return [(name, tensor) for name, tensor in every if name.startswith(inside) and tuple(tensor.shape) in shapes]

    matrices = [(name, tensor) for name, tensor in tensors() if tensor.dim() > 1]
    if likeness(sketched(matrices), sketches).foreign:  # the scales of norms are alike in many models
        raise RecipeError("the recipe belongs to another model: other weights.")
    if not tensors():
        raise RecipeError("the recipe cannot be compared with this model: no weight has the shape of one of its own.")
    graph = replace(recipe.graphs[0], sites=tuple(sites.values()), tensors=sketches)
    mine = replace(recipe, graphs=(graph,))
    served = ServedModel(tensors, lambda: here, Options.parse({"recipe": mine}))
    return Calls(served, sites)


def _heads(impl: Any) -> tuple[int, int, int]:
    return impl.num_heads, impl.num_kv_heads, impl.head_size


def _root_of(layer: nn.Module) -> nn.Module:
    """The model that a layer is part of: a module does not know what holds it, the garbage collector does."""
    above: dict[int, nn.Module] = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            above.update((id(part), candidate) for part in candidate._modules.values() if part is not None)
    while id(layer) in above:
        layer = above[id(layer)]
    return layer


def _say(sentence: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.afbs").info("afbs: %s", sentence)
