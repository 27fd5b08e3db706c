"""MODEL of the command line: a Hugging Face folder or id, ``package.module:factory``, or a ``.pt2``."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from afbs_compile.cli.progress import step, terminal
from afbs_compile.errors import OptionError
from afbs_compile.kernels.attend.machine import loads_as_saved

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class LoadedModel:
    """A model and what is known about its inputs.

    Attributes:
        spec: what the user wrote.
        module: the model, in evaluation mode where it has one; called with one sample's arguments.
        program: the exported program that ``module`` came from, for a ``.pt2``.
        tokenizer: folder or id that its tokenizer is loaded from, if it comes with one.
        device: where it is.
    """

    spec: str
    module: nn.Module
    program: ExportedProgram | None
    tokenizer: str | None
    device: torch.device

    @property
    def config(self) -> Any:
        """The transformers configuration, or ``None``."""
        return getattr(self.module, "config", None)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its floating parameters; ``None`` where it has none."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)

    @property
    def positions(self) -> int | None:
        """The longest input that its positions allow, where its configuration says so."""
        number = getattr(self.config, "max_position_embeddings", None)
        return number if isinstance(number, int) and number > 0 else None

    @property
    def arguments(self) -> list[str] | None:
        """Names of the arguments of its forward; ``None`` where it takes any."""
        if self.program is not None:
            names = self.program.call_spec.in_spec.child(1).context
            return list(names) or None
        parameters = inspect.signature(self.module.forward).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters) and self.config is None:
            return None
        return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]

    def check_length(self, length: int | None, option: str = "--seq-len") -> None:
        """Refuse a length that the model has no positions for.

        Raises:
            OptionError: naming the limit.
        """
        if length is not None and self.positions is not None and length > self.positions:
            raise OptionError(f"{option}: got {length}; accepted: up to {self.positions}, the positions of {self.spec}")


def load_model(spec: str, *, device: str | None = None, dtype: str | None = None) -> LoadedModel:
    """Load a model.

    Args:
        spec: see the module's docstring.
        device: as in torch; by default CUDA where there is one, and for a ``.pt2`` where it was exported.
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own elsewhere, a factory's as it is.

    Raises:
        OptionError: there is no such model, or it does not load; one sentence.
    """
    path = Path(spec)
    where = _device(device)
    with step(f"loading {spec}"):
        if path.suffix == ".pt2":
            return _exported(spec, device, dtype)
        if FACTORY.fullmatch(spec) and not path.exists():
            return _made(spec, where, dtype)
        return _hugging_face(spec, where, dtype)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says "not compiled with CUDA" by an AssertionError
        raise OptionError(f"--device: got {name}; accepted: a device of this machine, e.g. cpu") from error
    return device


def _exported(spec: str, device: str | None, dtype: str | None) -> LoadedModel:
    if not Path(spec).is_file():
        raise OptionError(f"MODEL: there is no file {spec}")
    if dtype is not None:
        raise OptionError(f"--dtype: not accepted with {spec}, whose dtype is written into it")
    try:
        program = torch.export.load(spec)
    except Exception as error:  # a damaged archive fails in as many ways as the format has parts
        raise OptionError(f"MODEL: {spec} cannot be loaded by torch.export ({_first_sentence(error)})") from error
    tensors = [*program.state_dict.values(), *(t for t in program.constants.values() if isinstance(t, torch.Tensor))]
    there = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device is not None and torch.device(device).type != there.type:
        raise OptionError(f"--device: got {device}; accepted: {there.type}, where {spec} was exported")
    return LoadedModel(spec, program.module(), program, None, there)


def _made(spec: str, device: torch.device, dtype: str | None) -> LoadedModel:
    """Call a factory; what its own code raises is the user's to see in full."""
    factory = _factory(spec)
    module = factory()
    if not isinstance(module, nn.Module):
        raise OptionError(f"MODEL: {spec} returned a {type(module).__name__}; accepted: a torch.nn.Module")
    module = module.eval().to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
    return LoadedModel(spec, module, None, getattr(module, "name_or_path", None) or None, device)


def _factory(spec: str) -> Callable[[], Any]:
    name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        raise OptionError(
            f"MODEL: there is no module {error.name} (looked for {spec} in the current folder and in what is installed)"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise OptionError(f"MODEL: {name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise OptionError(f"MODEL: {spec} is a {type(found).__name__}; accepted: a callable that returns the module")
    factory: Callable[[], Any] = found
    return factory


def _hugging_face(spec: str, device: torch.device, dtype: str | None) -> LoadedModel:
    transformers = import_extra("transformers", "MODEL")
    path = Path(spec).expanduser()
    if path.is_file():
        raise OptionError(f"MODEL: {spec} is a file; accepted: a folder, an id, package.module:factory or a .pt2")
    if path.is_dir() and not (path / "config.json").is_file():
        raise OptionError(f"MODEL: folder {spec} has no config.json; accepted: a folder of save_pretrained")
    if not path.exists() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec) is None:
        raise OptionError(f"MODEL: there is no folder {spec}")
    if not terminal():
        transformers.utils.logging.disable_progress_bar()
    name = str(path) if path.exists() else spec
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        auto = transformers.AutoModelForCausalLM if _is_causal_lm(config) else transformers.AutoModel
        wanted = getattr(torch, dtype) if dtype else ("auto" if loads_as_saved(device) else torch.float32)
        module, loaded = auto.from_pretrained(name, dtype=wanted, config=config, output_loading_info=True)
    except (OSError, ValueError, KeyError, import_extra("safetensors", "MODEL").SafetensorError) as error:
        raise OptionError(f"MODEL: {spec} cannot be loaded ({_first_sentence(error)})") from error
    if len(loaded["missing_keys"]) >= len(module.state_dict()):  # transformers makes random ones instead
        raise OptionError(f"MODEL: {spec} has none of the weights of a {type(module).__name__}")
    return LoadedModel(spec, module.eval().to(device), None, name, device)


def _is_causal_lm(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in known for name in config.architectures or ())


def import_extra(module: str, option: str) -> Any:
    """Import a library of the extra ``hf``.

    Raises:
        OptionError: it is not installed; the sentence names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise OptionError(
            f"{option}: this needs {module}, which is not installed: pip install 'afbs-compile[hf]'"
        ) from None


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!?]) ", text)[0].rstrip(".")
