"""Model inputs from ``.npz``, ``.pt`` and ``.safetensors``: tensors by the names of the forward's arguments."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afbs_compile.cli.models import LoadedModel, import_extra
from afbs_compile.errors import OptionError

SUFFIXES = (".npz", ".pt", ".safetensors")


def read_inputs(path: Path, model: LoadedModel, count: int | None) -> list[dict[str, Any]]:
    """One model input for each row of the tensors' first dimension; a ``.pt`` may hold a list of inputs instead.

    Floating tensors take the model's dtype. Tensors without dimensions go with every input.

    Raises:
        OptionError: the file is missing or damaged, has fewer inputs than ``count``, or names or lengths that the
            model does not take.
    """
    if not path.is_file():
        raise OptionError(f"--data: there is no file {path}")
    content = _read(path)
    batches = content if isinstance(content, list) else [content]
    rows = [row for batch in batches for row in _rows(_named(batch, path, model), path)]
    if not rows:
        raise OptionError(f"--data: {path} has no input")
    if count is not None and count > len(rows):
        raise OptionError(f"--samples: got {count}; accepted: up to {len(rows)}, the inputs in {path}")
    for row in rows:
        ids = row.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim:
            model.check_length(ids.shape[-1], f"--data: {path}")
    return [{name: _placed(value, model) for name, value in row.items()} for row in rows[:count]]


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            load_file = import_extra("safetensors.torch", "--data").load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError) as error:
        raise OptionError(f"--data: {path} is damaged, or no {path.suffix} ({_reason(error)})") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise OptionError(f"--data: {path} holds more than plain tensors, or is damaged") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OptionError(f"--data: {path} is damaged ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


def _named(batch: Any, path: Path, model: LoadedModel) -> dict[str, Tensor]:
    """Tensors by argument; a lone tensor is the first argument."""
    accepted = model.arguments
    if isinstance(batch, Tensor) and accepted:
        batch = {accepted[0]: batch}
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        raise OptionError(f"--data: {path} holds a {type(batch).__name__}; accepted: tensors by the names of arguments")
    unknown = [str(name) for name in batch if accepted is not None and name not in accepted]
    if unknown:
        raise OptionError(
            f"--data: {path} has {', '.join(unknown)}, which {model.spec} does not take; "
            f"accepted: {', '.join(accepted or ())}"
        )
    return dict(batch)


def _rows(batch: dict[str, Tensor], path: Path) -> list[dict[str, Tensor]]:
    sizes = {value.shape[0] for value in batch.values() if value.ndim}
    if len(sizes) > 1:
        raise OptionError(
            f"--data: the tensors in {path} have first dimensions {sorted(sizes)}; accepted: one batch size"
        )
    number = sizes.pop() if sizes else 1
    return [{name: t[i : i + 1] if t.ndim else t for name, t in batch.items()} for i in range(number)]


def _placed(value: Tensor, model: LoadedModel) -> Tensor:
    dtype = model.dtype if value.is_floating_point() else None
    return value.to(device=model.device, dtype=dtype)
