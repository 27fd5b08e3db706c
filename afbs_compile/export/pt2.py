"""torch.export's own file, and AOTInductor's compiled package.

Both call ``afbs::sparse_attention``, an operator in Python: the process that loads them imports
``afbs_compile.kernels.op`` first (:func:`afbs_compile.export.load` does) and needs nothing else of this package or of
the model's. An AOTInductor package calls it through PyTorch's proxy executor, so a process without Python, such as a
C++ server, cannot run it; there, and everywhere without this package, use ONNX.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import nn
from torch.export import ExportedProgram

import afbs_compile.kernels.op  # noqa: F401  registers the operator
from afbs_compile.errors import ExportError
from afbs_compile.export.files import NOTE, Exported, Note, first_line, target_path
from afbs_compile.export.inputs import Example
from afbs_compile.export.program import ExportProgram, rewritten_program
from afbs_compile.export.runner import Runner, call_as_exported
from afbs_compile.files import whole_file, written_by_foreign_code
from afbs_compile.recipe import Recipe


def to_pt2(
    model: nn.Module | ExportedProgram,
    recipe: Recipe,
    example: Example,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
    aoti: bool = False,
) -> Exported:
    """Write the model as a ``.pt2`` file with its attention calls made sparse.

    Args:
        model: in eval mode. A transformers model returns no cache and a ``dict`` of tensors.
        recipe: made for this model.
        example: one input: a mapping of arguments, a tuple of tensors, or a tensor. What is no tensor becomes a
            constant of the file.
        path: a file name that ends in ``.pt2``; it appears whole or not at all.
        dynamic: leave batch and length, and whatever else the model can, free.
        aoti: compile with AOTInductor: a package for this kind of machine, in place of a graph.

    Returns:
        What was written: every attention call with its outcome, and the shapes accepted.

    Raises:
        OptionError: the path, the example or the model's mode is not accepted.
        RecipeError: the recipe belongs to another model.
        ExportError: PyTorch cannot trace or compile the model.
        OSError: the file cannot be written.
    """
    target = target_path(path, "pt2")
    program = rewritten_program(model, recipe, example, dynamic=dynamic)
    with whole_file(target) as temporary, written_by_foreign_code(temporary) as file:
        if aoti:
            _compile(program, file)
        else:
            torch.export.save(program.exported, file, extra_files={NOTE: program.note.to_json()})
    return Exported(target, program.rows, program.inputs)


def _compile(program: ExportProgram, file: IO[bytes]) -> None:
    from torch._inductor import aoti_compile_and_package  # takes a second to import

    try:
        aoti_compile_and_package(
            program.exported,
            package_path=file,
            inductor_configs={"aot_inductor.metadata": {NOTE: program.note.to_json()}},
        )
    except Exception as error:  # inductor and the C++ compiler raise errors of many kinds
        raise ExportError(f"AOTInductor cannot compile the model: {first_line(error)}") from error


def load_pt2(path: Path, names: Sequence[str]) -> Runner:
    """Load what :func:`to_pt2` wrote.

    Args:
        path: the file; names: of the entries in its archive, which tell a compiled package from a graph.
    """
    if any("/aotinductor/" in name for name in names):
        return _load_package(path)
    note = Note.in_archive(path)
    module = torch.export.load(path).module()
    return Runner(note, lambda tensors: call_as_exported(module, note, tensors))


def _load_package(path: Path) -> Runner:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(path))
    note = Note.of_calls(package.get_metadata()[NOTE], path)
    # A package reads its inputs with the strides they were exported with, contiguous ones, and does not check them.
    return Runner(note, lambda tensors: call_as_exported(package, note, [t.contiguous() for t in tensors]))
