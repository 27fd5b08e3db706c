"""One model's part in the census: its attention calls in every form, and its output with all of them replaced."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from census_inputs import input_makers
from census_models import LENGTH, enliven, tiny_models
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from afbs_compile.found import FoundGraph
from afbs_compile.kernels.call import KEEP_ALL, Kept, SparseCall
from afbs_compile.kernels.compilations import forget_compilations, note_compilation
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.attention import sparse_attention
from afbs_compile.passes.capture import Attention, SampleRun, run_with
from afbs_compile.passes.operands import is_sdpa
from afbs_compile.passes.rewrite import rewrite

FORMS = ("alone", "ones", "left-padded")
HIDDEN = LENGTH // 3
TOLERANCE = 1e-3
EVERY_ROW = 1 << 20

Inputs = dict[str, Tensor]


class NotRunError(Exception):
    """The model does not run, with or without this package; carries why."""


def examine(model_type: str, forms: list[str]) -> dict[str, Any]:
    """The record of an architecture.

    Args:
        model_type: of transformers' AutoModel map; forms: of :data:`FORMS`.

    Returns:
        A ``not_run`` with the reason, or the level at which the configuration was made small, the inputs' shapes, and
        of each form that the model takes what :func:`_form` says.
    """
    try:
        level, model, make = running(model_type)
    except NotRunError as error:
        return {"not_run": str(error)}
    inputs = {name: list(value.shape) for name, value in make(1).items()}
    masked = "input_ids" in inputs and "attention_mask" in inspect.signature(model.forward).parameters
    record: dict[str, Any] = {"class": type(model).__name__, "small": level, "inputs": inputs, "forms": {}}
    for name in forms:
        if name == "alone" or masked:
            try:
                record["forms"][name] = _form(model, *_inputs(name, make))
            except NotRunError as error:
                record["forms"][name] = {"not_run": str(error)}
    return record


def running(model_type: str) -> tuple[str, nn.Module, Callable[[int], Inputs]]:
    """The smallest model that runs, with the inputs that it runs on.

    Raises:
        NotRunError: none does.
    """
    reasons: list[str] = []
    for level, model in tiny_models(model_type):
        if isinstance(model, Exception):
            reasons.append(f"cannot be built: {_said(model)}")
            continue
        failed = f"no inputs known for it: {', '.join(inspect.signature(model.forward).parameters)}"
        before = {name: value.clone() for name, value in model.state_dict().items()}
        enliven(model)
        for make in input_makers(model):
            try:
                if not _finite(_called(model, make(1))):
                    model.load_state_dict(before)  # some take no weights but their own
                _called(model, make(1))
            except Exception as error:
                failed = f"does not run on {', '.join(make(1))}: {_said(error)}"
            else:
                return level, model, make
        reasons.append(failed)
    raise NotRunError(next((reason for reason in reasons if not reason.startswith("cannot")), reasons[0]))


def _inputs(form: str, make: Callable[[int], Inputs]) -> tuple[Inputs, Tensor | None]:
    """Inputs in a form and, where it has padding, which tokens are none: bool ``[batch, length]``."""
    if form == "alone":
        return make(1), None
    if form == "ones":
        inputs = make(1)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, None
    inputs = make(2)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :HIDDEN] = 0
    return {**inputs, "attention_mask": mask}, mask.bool()


def _form(model: nn.Module, inputs: Inputs, visible: Tensor | None) -> dict[str, Any]:
    """Sites, refusals by name and reason, errors and crashes of a model on inputs.

    ``written out``: how many sites and refusals are no SDPA calls. ``errors`` are the largest differences of the output
    over its largest number: of the rewritten graph, whose calls are dense, and of the specification that computes every
    block. ``blind``: the output does not depend on attention.

    Raises:
        NotRunError: it runs only outside of Dynamo, or not as outside.
    """
    try:
        expected = _called(model, inputs)
    except Exception as error:
        raise NotRunError(_said(error)) from error
    backend = _Backend()
    compare = functools.partial(difference, expected, visible=visible, decoder="decoder_input_ids" in inputs)
    compiled = _compiled(model, backend)
    try:
        captured = compare(_called(compiled, inputs))
    except Exception as error:
        raise NotRunError(f"under Dynamo: {_said(error)}") from error
    sites, refusals = backend.sites, backend.refusals
    result: dict[str, Any] = {"graphs": len(backend.graphs), "sites": len(sites), "refusals": refusals, "errors": {}}
    result["written out"] = backend.written_out
    if captured > TOLERANCE and not backend.crashes:
        if compare(_called(_compiled(model, "eager"), inputs)) > TOLERANCE:
            raise NotRunError("under Dynamo its output is another one")
        result["errors"]["graph as found"] = captured
    if sites:
        backend.attention = _nothing
        result["blind"] = compare(_called(compiled, inputs)) <= TOLERANCE
        backend.attention = _every_block
        result["errors"]["every block"] = compare(_called(compiled, inputs))
        backend.attention = None
        backend.rewrite()
        result["errors"]["rewritten, dense"] = compare(_called(compiled, inputs))
    return {**result, "crashes": backend.crashes}


class _Backend:
    """Finds the attention calls of the graphs that Dynamo captures and runs the graphs, by another attention if asked.

    Attributes:
        graphs: what was found in each; crashes: what this package raised, and where.
        attention: computes the sites; ``None`` for the graphs' own.
    """

    def __init__(self) -> None:
        self.graphs: list[FoundGraph] = []
        self.crashes: list[str] = []
        self.attention: Attention | None = None
        self.reset = forget_compilations

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        note_compilation()
        try:
            found = FoundGraph.of(gm, inputs, min_length=1)
        except Exception as error:
            self._crashed(error)
            return gm
        self.graphs.append(found)

        def run(*values: Any) -> Any:
            if self.attention is None or not found.sites:
                return gm(*values)
            try:
                return run_with(SampleRun(gm, found.sites, values), self.attention)
            except Exception as error:
                self._crashed(error)
                return gm(*values)

        return run

    @property
    def sites(self) -> list[str]:
        return [site.name for found in self.graphs for site in found.sites]

    @property
    def refusals(self) -> list[tuple[str, str]]:
        return [(refusal.name, refusal.reason) for found in self.graphs for refusal in found.refusals]

    @property
    def written_out(self) -> tuple[int, int]:
        """How many of the sites, and of the refusals, are no SDPA calls but written out or inside other functions."""
        sites = [site.node for found in self.graphs for site in found.sites]
        refused = [refusal.node for found in self.graphs for refusal in found.refusals]
        return sum(not is_sdpa(node) for node in sites), sum(not is_sdpa(node) for node in refused)

    def rewrite(self) -> None:
        """Rewrite every site of every graph to a call whose heads are all dense."""
        for found in self.graphs:
            calls = {site: SparseCall.uniform(site.heads, KEEP_ALL) for site in found.sites}
            try:
                rewrite(found.gm, calls)
            except Exception as error:
                self._crashed(error)

    def _crashed(self, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        self.crashes.append(f"{_said(error)} ({Path(place.filename).name}:{place.lineno})")


def _compiled(model: nn.Module, backend: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=False)


@torch.no_grad()
def _called(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The tensors of a model's output; numbers drawn on the way are the same in every call."""
    torch.manual_seed(3)
    leaves = tree_leaves(model(**{name: value.clone() for name, value in inputs.items()}))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _every_block(name: str, operands: Operands) -> Tensor:
    call = SparseCall.uniform(operands.heads, 0.0, kept=Kept(last_rows=EVERY_ROW))
    return sparse_attention(operands, call)


def _nothing(name: str, operands: Operands) -> Tensor:
    return operands.q.new_zeros(*operands.q.shape[:3], operands.v.shape[3])


def difference(expected: list[Tensor], found: list[Tensor], *, visible: Tensor | None, decoder: bool) -> float:
    """The largest difference of any tensor over the tensor's largest number; infinite where they cannot be compared.

    Args:
        expected, found: outputs.
        visible: bool ``[batch, length]``, tokens that are no padding. Of tensors that are not by tokens, only those
            batch elements count that have no padding.
        decoder: tensors of another length are a decoder's, whose tokens are no padding.
    """
    if [x.shape for x in expected] != [x.shape for x in found]:
        return math.inf
    return max((_difference(a, b, visible, decoder) for a, b in zip(expected, found, strict=True)), default=0.0)


def _difference(a: Tensor, b: Tensor, visible: Tensor | None, decoder: bool) -> float:
    if visible is not None and a.dim() > 0:
        if a.shape[:2] == visible.shape and a.dim() > 2:
            a, b = a[visible], b[visible]
        elif a.shape[0] == len(visible) and not (decoder and a.dim() > 2):
            whole = visible.all(1)
            a, b = a[whole], b[whole]
    if not a.numel():
        return 0.0
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    a, b = (torch.where(a.isfinite(), x, 0.0).double() for x in (a, b))
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in outputs)


def _said(error: Exception) -> str:
    """Class and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
