"""The models whose attention is served, and which of their modules is making a call."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from afbs_compile.integrations.served import ServedModel, serve, serve_with
from afbs_compile.options import Options

CHECKED_STEPS = frozenset((2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233))
"""Forward passes of a model at whose calls thresholds of its first pass are measured again.

Denoising steps differ. Attention of most models settles in the first ones, so that the gaps grow; they are odd and
even, since pipelines that guide by two passes a step would otherwise show one of the two only.
"""


class Denoiser:
    """A model, its options and, from its first long call on, what serves it.

    Args:
        model: of diffusers.
        settings: options; where they name a recipe the model is held to it at once.

    Raises:
        RecipeError: the recipe is damaged or belongs to another model.
    """

    def __init__(self, model: nn.Module, settings: Options) -> None:
        self.settings = settings
        self.passes = 0
        self._model = weakref.ref(model)
        self._served: ServedModel | None = None
        if settings.recipe is not None:
            self._served = self._serve()

    @property
    def served(self) -> ServedModel:
        """What serves the calls, made when it is first asked for: by then weights are on their device."""
        if self._served is None:
            self._served = self._serve()
        return self._served

    def begin_pass(self) -> None:
        """Called before each forward pass of the model."""
        self.passes += 1
        served = self._served
        if served is not None and self.passes in CHECKED_STEPS and self.settings.recipe is None:
            served.check_again()

    def _serve(self) -> ServedModel:
        model = self._model()
        assert model is not None  # it is being called
        return serve_with(model, self.settings)


class Place(NamedTuple):
    """Where a module stands: what serves its model, and its path there."""

    denoiser: Denoiser
    name: str


@dataclass
class _Entry:
    """A module with attention that is running: how it is watched, and how many calls it made so far."""

    place: Place
    watch: AbstractContextManager[Any]
    calls: int = 0


class _Running(threading.local):
    """The modules with attention that run now, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Entry] = []


_running = _Running()
_denoisers: weakref.WeakKeyDictionary[nn.Module, Denoiser] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()


def denoiser_of(model: nn.Module) -> Denoiser | None:
    """What is known of a model, if anything is yet."""
    return _denoisers.get(model)


def learn(model: nn.Module, options: Mapping[str, Any]) -> Denoiser:
    """Serve a model with these options from now on.

    Raises:
        OptionError: an option is unknown or out of range.
        RecipeError: the recipe is damaged or belongs to another model.
    """
    _denoisers[model] = denoiser = Denoiser(model, Options.parse(options))
    for name, module in model.named_modules():
        _places[module] = Place(denoiser, name)
    return denoiser


def forget(model: nn.Module) -> None:
    """Serve it no longer."""
    if _denoisers.pop(model, None) is not None:
        serve(model, None)
    for module in model.modules():
        _places.pop(module, None)


def enter(module: nn.Module, watch: AbstractContextManager[Any]) -> None:
    """A module with attention begins.

    Args:
        module: one of a model that is served, else nothing happens; watch: entered until the module ends.
    """
    place = _places.get(module)
    if place is not None:
        watch.__enter__()
        _running.stack.append(_Entry(place, watch))


def leave(module: nn.Module) -> None:
    """It ends."""
    if _running.stack and _places.get(module) is _running.stack[-1].place:
        _running.stack.pop().watch.__exit__(None, None, None)


def calling() -> tuple[Denoiser, str] | None:
    """Whose call this is: the model, and the call's name, ``#2`` for a module's second; ``None`` where nobody said."""
    if not _running.stack:
        return None
    entry = _running.stack[-1]
    entry.calls += 1
    return entry.place.denoiser, entry.place.name if entry.calls == 1 else f"{entry.place.name}#{entry.calls}"


def model_on_the_stack() -> nn.Module | None:
    """The outermost model of diffusers whose forward pass is running.

    Asked once for a model: an environment variable or a context manager switched it on, which are told no model.
    """
    found: nn.Module | None = None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            found = owner if isinstance(owner, ModelMixin) else found
        frame = frame.f_back  # type: ignore[assignment]
    return found
