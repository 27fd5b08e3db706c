"""What every format shares about its file: its suffix, the note inside it, and that it appears whole or not at all."""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afbs_compile import recipe_schema3
from afbs_compile.errors import ExportError, OptionError
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.version import __version__

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "tensorrt": ".ep", "tensorrt-rtx": ".engine"}
"""The suffix of each format's files."""

NOTE = "afbs_note.json"
"""Name of the :class:`Note` inside a file."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the file.
        rows: every attention call of the model in graph order, with its outcome and reason IN THIS FILE.
        inputs: shape of each tensor argument; a string such as ``"batch"`` or ``"length"`` is a free size.
    """

    path: Path
    rows: tuple[SiteRecipe, ...]
    inputs: Mapping[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Note:
    """What a file says about itself, so that it can be run and judged without the model.

    Attributes:
        inputs: names of the tensor arguments, in order; positional: how many of them have no name in a call.
        recipe: what it was made with, without the search paths.
    """

    inputs: tuple[str, ...]
    positional: int
    recipe: Recipe

    def to_json(self) -> str:
        """The note as one line of JSON."""
        recipe = json.loads(self.recipe.to_json())
        return json.dumps({"inputs": self.inputs, "positional": self.positional, "recipe": recipe})

    @classmethod
    def from_json(cls, text: str) -> Note:
        """Read a note.

        Raises:
            RecipeError: its recipe is of another version.
        """
        data = json.loads(text)
        recipe = Recipe.from_json(json.dumps(data["recipe"]), "the recipe of this file")
        return cls(tuple(data["inputs"]), data["positional"], recipe)

    @classmethod
    def of_calls(cls, text: str, path: Path) -> Note:
        """Read the note of a file that calls the operator of this package, which must mean today what it meant then.

        Raises:
            ExportError: a version wrote the file whose operator had other arguments, or selected other blocks by them.
        """
        if json.loads(text)["recipe"]["schema_version"] <= recipe_schema3.VERSION:
            raise ExportError(
                f"{path} was written by afbs-compile 0.1, whose attention operator had other arguments: "
                f"export the model again with this version, {__version__}."
            )
        note = cls.from_json(text)
        if note.recipe.predictor_version != PREDICTOR_VERSION:
            raise ExportError(
                f"{path} was written for predictor version {note.recipe.predictor_version}, this is "
                f"{PREDICTOR_VERSION}: export the model again with this version, {__version__}."
            )
        return note

    @classmethod
    def in_archive(cls, path: Path) -> Note:
        """The note of a file that torch.export wrote; read before the program, which may not load."""
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/{NOTE}"))
            return cls.of_calls(archive.read(name).decode(), path)


def as_written(recipe: Recipe, rows: Iterable[SiteRecipe]) -> Recipe:
    """The recipe with what a file does of it, for those who compare the two.

    Its calls get their outcome and thresholds in the file, which hold at every length, and lose how the thresholds were
    found: most of the recipe's size, and nothing that a file needs.
    """
    row_of = {row.name: row for row in rows}

    def site(recorded: SiteRecipe) -> SiteRecipe:
        row = row_of.get(recorded.name, recorded)
        heads = tuple(replace(head, search=()) for head in row.heads or recorded.heads)
        recorded = replace(recorded, call=row.call or recorded.call, heads=heads, validated_lengths=None)
        return replace(recorded, outcome=row.outcome, reason=row.reason)

    graphs = tuple(replace(graph, sites=tuple(map(site, graph.sites))) for graph in recipe.graphs)
    return replace(recipe, graphs=graphs)


def target_path(path: str | os.PathLike[str], form: str) -> Path:
    """The path to write to.

    Raises:
        OptionError: another suffix, a folder in its place, or a folder that is missing.
    """
    target, suffix = Path(path), SUFFIXES[form]
    if target.suffix != suffix:
        raise OptionError(f"path: got {str(target)!r}; accepted for {form}: a file name that ends in {suffix}")
    if target.is_dir() or not target.parent.is_dir():
        raise OptionError(f"path: got {str(target)!r}; accepted: a file in a folder that exists")
    return target


def extra(modules: Sequence[str], name: str) -> list[Any]:
    """Import packages that an extra brings.

    Raises:
        ExportError: one is not installed; the sentence names the extra.
    """
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise ExportError(
            f"{error.name or modules[0]} is not installed; pip install 'afbs-compile[{name}]' brings it."
        ) from error
    except Exception as error:  # torch-tensorrt raises a plain one where TensorRT's libraries are missing
        raise ExportError(f"{modules[0]} is installed and cannot be imported: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of another package says, in one line: that of its first cause, where the rest only wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
