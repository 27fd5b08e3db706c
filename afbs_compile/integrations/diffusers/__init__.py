"""``model.set_attention_backend("afbs")``: sparse attention in models of diffusers, without ``torch.compile``.

    import afbs_compile.integrations.diffusers as afbs

    afbs.register()
    pipeline.transformer.set_attention_backend("afbs")

The first denoising step calibrates, attention call by attention call, later steps check what it found, and a recipe
stays in the cache; :func:`use` gives a model a recipe of its own, or other options. What cannot be sparse is computed
as the backend "native" computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from afbs_compile.errors import AfbsError, OptionError
from afbs_compile.integrations.diffusers.dispatcher import NAME, active_backend, add_backend, set_active_backend

# isort: split
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from afbs_compile.integrations.diffusers.attention import PARALLEL, attach, detach, dispatched
from afbs_compile.integrations.diffusers.models import denoiser_of
from afbs_compile.integrations.served import ServedModel

Used = TypeVar("Used", bound=nn.Module | DiffusionPipeline)


def register() -> None:
    """Make ``"afbs"`` known to diffusers as an attention backend; a second time does nothing."""
    add_backend(dispatched)
    for name in ("set_attention_backend", "reset_attention_backend"):
        method = getattr(ModelMixin, name)
        if not hasattr(method, "__wrapped__"):
            setattr(ModelMixin, name, _told(method))


def use(model: Used, **options: Any) -> Used:
    """Switch a model to ``"afbs"``, with options of its own.

    Args:
        model: of diffusers, in eval mode, on its device; or a pipeline, of which every model with attention is switched
            but the autoencoder.
        options: of :mod:`afbs_compile.options`: ``recipe=`` a :class:`afbs_compile.Recipe` or its file, or what the
            first denoising step calibrates with.

    Returns:
        What came.

    Raises:
        OptionError: an option is unknown or out of range, or the model is none of diffusers.
        RecipeError: the recipe is damaged or belongs to another model.
        AfbsError: the model runs in context parallel.
    """
    register()
    before = active_backend()
    try:
        for part in _denoisers(model):
            if any(getattr(_processor(module), "_parallel_config", None) is not None for module in part.modules()):
                raise AfbsError(f"{type(part).__name__} stays as it is, {PARALLEL}.")
            attach(part, options)
            part.set_attention_backend(NAME)
    finally:
        set_active_backend(before)  # diffusers switches every other model of the process along
    return model


def served(model: nn.Module) -> ServedModel | None:
    """The calls of a model that was switched to ``"afbs"``: their ``rows`` and the ``recipe``; ``None`` for others."""
    denoiser = denoiser_of(model)
    return None if denoiser is None else denoiser.served


def _told(method: Callable[..., None]) -> Callable[..., None]:
    """The method of a model, which from now on learns that its backend is ours, or no longer."""

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        named = [*args, *kwargs.values()][:1]
        if not named or str(getattr(named[0], "value", named[0])).lower() != NAME:
            detach(self)
        elif denoiser_of(self) is None:
            attach(self, {})

    return wrapper


def _denoisers(model: nn.Module | DiffusionPipeline) -> list[Any]:
    """The models to switch."""
    if isinstance(model, ModelMixin):
        return [model]
    if not isinstance(model, DiffusionPipeline):
        raise OptionError(f"model: got a {type(model).__name__}; accepted: a model or a pipeline of diffusers")
    pipeline: Any = model
    parts = [part for part in pipeline.components.values() if isinstance(part, ModelMixin)]
    return [
        part
        for part in parts
        if not hasattr(part, "decode") and any(_processor(module) is not None for module in part.modules())
    ]


def _processor(module: nn.Module) -> Any:
    return getattr(module, "processor", None)


__all__ = ["NAME", "register", "served", "use"]
