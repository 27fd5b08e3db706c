"""Open an exported file as a function of tensors."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from afbs_compile.errors import AfbsError, ExportError, OptionError
from afbs_compile.export.files import SUFFIXES, first_line
from afbs_compile.export.runner import Runner


def load(path: str | os.PathLike[str]) -> Runner:
    """Load a file that one of the exporters of this package wrote.

    Args:
        path: ``.pt2`` (torch.export or AOTInductor), ``.onnx`` (runs with onnxruntime), or ``.ep`` (torch-tensorrt).
            An ``.engine`` is run by TensorRT for RTX itself.

    Returns:
        A function of the model's tensors, by position or by name, that returns a tuple of tensors.

    Raises:
        OptionError: the file is missing or has another suffix.
        ExportError: it cannot be read, was not written by this package, needs an extra that is not installed, or is an
            engine.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES.values():
        raise OptionError(f"path: got {str(file)!r}; accepted: a file that ends in {', '.join(SUFFIXES.values())}")
    if not file.is_file():
        raise OptionError(f"path: got {str(file)!r}; accepted: a file that exists")
    try:
        return _load(file)
    except AfbsError:
        raise
    except Exception as error:  # a damaged file makes the readers fail in many ways
        raise ExportError(
            f"{file} cannot be loaded, it is damaged or was not written by this package: {first_line(error)}"
        ) from error


def _load(file: Path) -> Runner:
    if file.suffix == SUFFIXES["onnx"]:
        from afbs_compile.export.onnx import load_onnx

        return load_onnx(file)
    if file.suffix == SUFFIXES["tensorrt-rtx"]:
        from afbs_compile.export.tensorrt_rtx import program_beside

        raise ExportError(
            f"{file} is run by TensorRT for RTX, not by this package; {program_beside(file)}, the program that it was "
            "built from, can be loaded."
        )
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if file.suffix == SUFFIXES["tensorrt"]:
        from afbs_compile.export.tensorrt import load_tensorrt

        return load_tensorrt(file)
    from afbs_compile.export.pt2 import load_pt2

    return load_pt2(file, names)
