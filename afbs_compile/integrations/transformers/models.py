"""Which model an attention module is part of, and what serves its calls."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from afbs_compile.errors import AfbsError, AfbsWarning
from afbs_compile.integrations.served import ServedModel, is_served, serve, served_model
from afbs_compile.options import Options

CONFIG_ATTRIBUTE = "afbs"
"""Of a model's config: a mapping of options, for those who cannot call :func:`use`."""


class Place(NamedTuple):
    """Where a module stands: the model, and its path there."""

    model: weakref.ref[PreTrainedModel]
    name: str


_places: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()


def served_by(module: nn.Module) -> tuple[ServedModel, str] | None:
    """What serves the model that a module is part of, and the module's path in it; ``None`` where nothing can."""
    place = _places.get(module)
    model = None if place is None else place.model()
    if place is None or model is None:
        model = _model_of(module)
        if model is None:
            return None
        for name, part in model.named_modules():
            _places[part] = Place(weakref.ref(model), name)
        place = _places[module]
    if not is_served(model):
        _serve_by_config(model)
    served = served_model(model)
    return None if served is None else (served, place.name)


def serve_with(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Serve a model's calls with these options from now on.

    Raises:
        OptionError: an option is unknown or out of range.
        RecipeError: the recipe is damaged or belongs to another model.
    """
    held = weakref.ref(model)

    def names() -> Iterator[str]:
        alive = held()
        yield from () if alive is None else (name for name, _ in alive.named_modules())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        alive = held()
        if alive is not None:
            yield from alive.named_parameters()
            yield from alive.named_buffers()

    serve(model, ServedModel(tensors, names, Options.parse(options)))


def _serve_by_config(model: PreTrainedModel) -> None:
    """As its config says; options that are wrong leave it dense, with a sentence."""
    options = getattr(model.config, CONFIG_ATTRIBUTE, None) or {}
    try:
        serve_with(model, options)
    except AfbsError as error:
        warnings.warn(f"attention stays dense: {error}", AfbsWarning, stacklevel=2)
        serve(model, None)


def _model_of(module: nn.Module) -> PreTrainedModel | None:
    """The outermost model of transformers that a module is part of.

    A module does not know what holds it. Whoever calls its attention holds the model, so the garbage collector knows.
    """
    found: PreTrainedModel | None = None
    size = 0
    for candidate in gc.get_objects():
        if issubclass(type(candidate), PreTrainedModel):
            modules = list(candidate.modules())
            if len(modules) > size and any(part is module for part in modules):
                found, size = candidate, len(modules)
    return found
