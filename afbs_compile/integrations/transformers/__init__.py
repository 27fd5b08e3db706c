"""``attn_implementation="afbs"``: sparse attention in models of transformers, without ``torch.compile``.

    import afbs_compile.integrations.transformers as afbs

    afbs.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="afbs")

The first long call calibrates, attention call by attention call, and leaves a recipe in the cache; :func:`use` gives a
model a recipe of its own, or other options. Long prefills are sparse; decode steps, short calls, training and calls
that return their weights are computed as ``"sdpa"`` computes them.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from afbs_compile.integrations.served import served_model
from afbs_compile.integrations.transformers.attention import attention
from afbs_compile.integrations.transformers.masks import mask_interface
from afbs_compile.integrations.transformers.models import serve_as_asked
from afbs_compile.recipe import Recipe

NAME = "afbs"


def register() -> None:
    """Make ``"afbs"`` known to transformers as an attention implementation; a second time does nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_interface)


def use(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Switch a model to ``"afbs"``, with options of its own.

    Args:
        model: in eval mode; any whose attention goes through transformers' attention interface.
        options: of :mod:`afbs_compile.options`: ``recipe=`` a :class:`afbs_compile.Recipe` or its file, or what the
            first long call calibrates with. A model's config may have them instead, as the mapping ``config.afbs``.

    Returns:
        The model.

    Raises:
        OptionError: an option is unknown or out of range.
        RecipeError: the recipe is damaged or belongs to another model.
    """
    register()
    serve_as_asked(model, options)
    model.set_attn_implementation(NAME)
    return model


def recipe_of(model: PreTrainedModel) -> Recipe | None:
    """The recipe that a model of this implementation runs with: the one it was given, or what its calls have made.

    ``None`` where nothing was calibrated yet. In tensor parallel it has all heads, in every process.
    """
    served = served_model(model)
    return None if served is None else served.recipe


__all__ = ["NAME", "recipe_of", "register", "use"]
