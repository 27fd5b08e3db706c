"""TensorRT for RTX: an engine of the ONNX program, built without a GPU, with that program beside it.

An engine ``model.engine`` holds nothing but what TensorRT reads. What is known of it lies beside it, in
``model.engine.onnx``: the program that it was built from, which onnxruntime runs anywhere, with this package's note and
the engine's SHA-256. Engines run on NVIDIA GPUs of compute capability 7.5, 8.x and 12.x; this project has none of them,
and built but never ran one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from afbs_compile.errors import ExportError
from afbs_compile.export.files import NOTE, Exported, extra, target_path
from afbs_compile.export.inputs import Example, ExportInputs
from afbs_compile.export.onnx import to_onnx
from afbs_compile.export.rtx_build import BINDINGS, Range, build
from afbs_compile.files import whole_file
from afbs_compile.recipe import Recipe

EXTRA = "tensorrt-rtx"
DIGEST = "afbs_engine_sha256"
"""Metadata of the program beside an engine."""

NOT_RUN = (
    "the engine was not run: TensorRT for RTX runs engines on NVIDIA GPUs of compute capability 7.5, 8.x and 12.x, "
    "and this package only builds them"
)


def to_tensorrt_rtx(
    model: nn.Module | ExportedProgram,
    recipe: Recipe,
    example: Example,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
    plugin: bool = False,
) -> Exported:
    """Write the model as an engine of TensorRT for RTX with its attention calls made sparse; needs no GPU.

    Args:
        model, recipe, example: as in :func:`afbs_compile.export.to_onnx`.
        path: a file name that ends in ``.engine``. ``path`` and the program that it was built from, ``path`` and
            ``.onnx``, appear whole or not at all.
        dynamic: accept every batch and length from 1 to the example's; the engine is tuned for the example's.
        plugin: a plugin of :mod:`afbs_compile.export.rtx_plugin` for each sparse call, which calls this package's
            kernels, in place of layers of TensorRT.

    Returns:
        What was written: every attention call with its outcome, and the shapes accepted.

    Raises:
        OptionError: an argument is not accepted.
        RecipeError: the recipe belongs to another model.
        ExportError: the extra ``tensorrt-rtx`` is missing, PyTorch cannot translate the model, or TensorRT cannot build
            the engine.
        OSError: a file cannot be written.
    """
    import onnx  # the extra export, which to_onnx asks for

    target = target_path(path, "tensorrt-rtx")
    extra((BINDINGS, "onnx", "onnxscript"), EXTRA)
    with whole_file(program_beside(target)) as program, whole_file(target) as engine:
        written = to_onnx(model, recipe, example, program, dynamic=dynamic)
        build(program, engine, _ranges(model, example, written), plugin=plugin)
        proto = onnx.load(program)
        proto.metadata_props.add(key=DIGEST, value=_digest(engine))
        onnx.save_model(proto, program)
    return Exported(target, written.rows, written.inputs)


def program_beside(engine: Path) -> Path:
    """The ONNX file that belongs to an engine."""
    return engine.with_name(f"{engine.name}.onnx")


def program_of(engine: Path) -> Path:
    """The ONNX file that an engine was built from.

    Raises:
        ExportError: it is missing, or is that of another engine.
    """
    (onnx,) = extra(("onnx",), "export")
    program = program_beside(engine)
    if not program.is_file():
        raise ExportError(f"{engine}: the program that it was built from, {program}, is not beside it.")
    texts = {entry.key: entry.value for entry in onnx.load(program).metadata_props}
    if NOTE not in texts or texts.get(DIGEST) != _digest(engine):
        raise ExportError(f"{engine} is not the engine that was built from {program}: its SHA-256 is another.")
    return program


def _digest(engine: Path) -> str:
    with engine.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ranges(model: nn.Module | ExportedProgram, example: Example, written: Exported) -> dict[str, Range]:
    """For each input with free sizes the sizes that the engine accepts: from 1 to the example's."""
    module = model.module() if isinstance(model, ExportedProgram) else model
    inputs = ExportInputs.of(module, example)
    shapes = dict(zip(inputs.names, (tuple(tensor.shape) for tensor in inputs.tensors), strict=True))
    ranges: dict[str, Range] = {}
    for name, sizes in written.inputs.items():
        if any(isinstance(size, str) for size in sizes):
            least = tuple(size if isinstance(size, int) else 1 for size in sizes)
            ranges[name] = (least, shapes[name], shapes[name])
    return ranges
