"""Which model an attention module is part of, and what serves its calls."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from afbs_compile.errors import AfbsError, AfbsWarning
from afbs_compile.integrations.served import ServedModel, is_served, serve, serve_with, served_model
from afbs_compile.options import Options

CONFIG_ATTRIBUTE = "afbs"
"""Of a model's config: a mapping of options, for those who cannot call :func:`use`."""


class Place(NamedTuple):
    """Where a module stands: the model, and its path there."""

    model: weakref.ref[PreTrainedModel]
    name: str


_places: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()
_supports: dict[int, tuple[weakref.ref[Any], bool]] = {}
"""By the config's ``id``: configs compare by value."""


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


def serve_as_asked(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Serve a model's calls with these options from now on.

    Raises:
        OptionError: an option is unknown or out of range.
        RecipeError: the recipe is damaged or belongs to another model.
    """
    serve_with(model, Options.parse(options))


def _serve_by_config(model: PreTrainedModel) -> None:
    """As its config says; options that are wrong leave it dense, with a sentence."""
    options = getattr(model.config, CONFIG_ATTRIBUTE, None) or {}
    try:
        serve_as_asked(model, options)
    except AfbsError as error:
        warnings.warn(f"attention stays dense: {error}", AfbsWarning, stacklevel=2)
        serve(model, None)


def supports_sdpa(config: Any) -> bool:
    """Whether a model of this config may be computed by SDPA: one that may not expects eager attention's masks."""
    if config is None:
        return True
    known = _supports.get(id(config))
    if known is not None and known[0]() is config:
        return known[1]
    answer = all(type(model)._supports_sdpa for model in _models() if model.config is config)
    _supports[id(config)] = (weakref.ref(config), answer)
    return answer


def _models() -> Iterator[PreTrainedModel]:
    return (each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel))


def _model_of(module: nn.Module) -> PreTrainedModel | None:
    """The outermost model of transformers that a module is part of.

    A module does not know what holds it. Whoever calls its attention holds the model, so the garbage collector knows.
    """
    found: PreTrainedModel | None = None
    size = 0
    for candidate in _models():
        modules = list(candidate.modules())
        if len(modules) > size and any(part is module for part in modules):
            found, size = candidate, len(modules)
    return found
