"""Recipe files of the command line, and inputs to a recipe's own length."""

from __future__ import annotations

from pathlib import Path

from afbs_compile.cli.models import LoadedModel
from afbs_compile.cli.sources import LENGTH, Reading, Sample, load_samples, takes_length
from afbs_compile.errors import OptionError
from afbs_compile.recipe import Recipe

SUFFIX = ".json"


def load_recipe(path: str, option: str = "--recipe") -> Recipe:
    """Read a recipe.

    Raises:
        OptionError: the name does not end in ``.json``; RecipeError: what is wrong with the file.
    """
    if Path(path).suffix.lower() != SUFFIX:
        raise OptionError(f"{option}: got {path}; accepted: a file name that ends in {SUFFIX}")
    return Recipe.load(path)


def calibrated_length(recipe: Recipe | None) -> int:
    """Tokens of the longest sample that the recipe was calibrated on."""
    return LENGTH if recipe is None else max(graph.samples.lengths[1] for graph in recipe.graphs)


def example_input(
    model: LoadedModel, recipe: Recipe | None, *, source: str, length: int | None, reading: Reading
) -> Sample:
    """One input: of the length asked for, else the recipe's, else the longest usual one that the model takes."""
    length = usual_length(model, recipe, source) if length is None else length
    return load_samples(source, model, length=length, count=1, reading=reading)[0]


def usual_length(model: LoadedModel, recipe: Recipe | None, source: str) -> int | None:
    """The recipe's length as far as the model has positions; ``None`` where the source has lengths of its own."""
    if not takes_length(source, model):
        return None
    length = calibrated_length(recipe)
    return min(length, model.positions or length)
