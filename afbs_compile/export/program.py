"""A model as an exported program whose attention calls are rewritten by a recipe: what every format starts from.

torch.export keeps each attention call as one operator until its decompositions run, so the calls are rewritten before.
The recipe was made from the graphs that Dynamo captures; whether it belongs to this model is asked on those, and its
decisions are carried over call by call, since both ways of tracing see the same calls in the same order.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from afbs_compile.errors import AfbsWarning, ExportError, OptionError, RecipeError
from afbs_compile.export.files import Note, as_written, first_line
from afbs_compile.export.inputs import Example, ExportInputs
from afbs_compile.found import FoundGraph
from afbs_compile.kernels.call import SparseCall
from afbs_compile.passes.capture import SampleRun
from afbs_compile.passes.find import find
from afbs_compile.passes.marking import mark_calls
from afbs_compile.passes.record import record_graphs
from afbs_compile.passes.rewrite import rewrite
from afbs_compile.passes.site import AttentionSite, Refusal
from afbs_compile.passes.sizes import fixed
from afbs_compile.plan import NOT_CALIBRATED, Plan, in_own_precision
from afbs_compile.reasons import NONE_FOUND, grouped
from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.revalidate import revalidated

ASSERTION = torch.ops.aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class ExportProgram:
    """A rewritten program.

    Attributes:
        exported: with ``afbs::sparse_attention`` in place of the planned calls.
        rows: every attention call in graph order, with its outcome here.
        note: goes into the file.
        inputs: shape of each tensor argument; a string is a free size.
        sizes: the program's symbols that have such a name.
        module: what was traced.
    """

    exported: ExportedProgram
    rows: tuple[SiteRecipe, ...]
    note: Note
    inputs: dict[str, tuple[int | str, ...]]
    sizes: dict[str, str]
    module: nn.Module


Captured = tuple[FoundGraph, list[Any]]
"""A graph that Dynamo captured, and the values of its placeholders."""

Refuse = Callable[[AttentionSite, SparseCall], str | None]
"""Why a format has no form for a call; None where it has."""


def rewritten_program(
    model: nn.Module | ExportedProgram,
    recipe: Recipe,
    example: Example,
    *,
    dynamic: bool,
    refuse: Refuse = lambda site, call: None,
    no_fp8: str | None = None,
) -> ExportProgram:
    """Trace a model and rewrite its attention calls as a recipe says.

    Args:
        model: in eval mode; it runs once on the example, without gradients.
        recipe: made for this model, its weights, dtype and device type.
        example: one input; its sizes are those of the program unless ``dynamic``.
        dynamic: leave every size free that the model can leave free, such as batch and length.
        refuse: what the format cannot express; such a call stays dense.
        no_fp8: why the format has no FP8, if it has none; heads in FP8 are then in their own precision.

    Raises:
        OptionError: the model is in training mode, or the example does not fit it.
        RecipeError: the recipe belongs to another model.
        ExportError: torch.export cannot trace the model, or sees other attention calls than Dynamo.
    """
    module: nn.Module = model.module() if isinstance(model, ExportedProgram) else getattr(model, "_orig_mod", model)
    if module.training and not isinstance(module, fx.GraphModule):
        raise OptionError("model: got one in training mode; accepted: a model after model.eval()")
    graphs = _captured(module, example)
    inputs = ExportInputs.of(module, example)
    exported = _trace(module, inputs.doubled() if dynamic else inputs, dynamic)
    gm = exported.graph_module
    mark_calls(gm)
    sites, refusals = find(gm, min_length=1)
    sizes = {str(call.q_len): "length" for call in sites} | {str(call.batch): "batch" for call in sites}
    shapes = _shapes(exported, inputs.names, sizes)
    if dynamic and not any(isinstance(size, str) for shape in shapes.values() for size in shape):
        raise ExportError("dynamic: the model fixes the size of every input; export it without dynamic shapes.")
    plan = _carried_over(graphs, _in_order(gm, (*sites, *refusals)), recipe)
    rewritten, rows = _expressible(plan, refuse, no_fp8)
    if not rewritten:
        why = grouped(row.reason for row in rows) if rows else NONE_FOUND
        warnings.warn(f"the export has no sparse call: {why}.", AfbsWarning, stacklevel=3)
    before = _results(gm)
    rewrite(gm, rewritten)
    for old, new in zip(before, _results(gm), strict=True):
        if old != new:
            exported.graph_signature.replace_all_uses(old, new)
    note = Note(inputs.names, len(inputs.args), as_written(recipe, rows))
    return ExportProgram(exported, rows, note, shapes, sizes, module)


def _captured(module: nn.Module, example: Example) -> list[Captured]:
    """What Dynamo captures of the model on the example: the graphs that recipes are made for, with their inputs."""
    try:
        recorded = record_graphs(module, [example])
    except Exception as error:  # whatever the user's model raises on an input that does not fit it
        raise OptionError(f"example: the model does not run on it: {first_line(error)}") from error
    return [(FoundGraph.of(graph.gm, graph.samples[0], 1, graph.prefixes), graph.samples[0]) for graph in recorded]


def _trace(module: nn.Module, inputs: ExportInputs, dynamic: bool) -> ExportedProgram:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides attention in fused operators
    try:
        with torch.no_grad(), _plain_forward(module, inputs) as forward:
            exported = torch.export.export(
                module,
                inputs.args,
                inputs.kwargs,
                dynamic_shapes=inputs.free_sizes(forward) if dynamic else None,
                strict=False,
            )
    except Exception as error:  # torch.export raises errors of many kinds for what it cannot trace
        raise ExportError(f"torch.export cannot trace the model: {first_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    # They say once more what the trace has fixed, and keep alive the masks that the rewrite makes superfluous.
    for node in exported.graph.find_nodes(op="call_function", target=ASSERTION):
        exported.graph.erase_node(node)
    return exported


@contextmanager
def _plain_forward(module: nn.Module, inputs: ExportInputs) -> Iterator[Callable[..., Any]]:
    """Give the module a ``forward`` with the constants filled in and plain dictionaries as output.

    A transformers model is asked not to return its cache, which no file can hold, and its output class becomes a
    ``dict``, so that the file can be read without transformers.
    """
    original = module.forward
    constants = dict(inputs.constants)
    if getattr(getattr(module, "config", None), "use_cache", None) and "use_cache" not in inputs.names:
        constants.setdefault("use_cache", False)
    known = inspect.signature(original).parameters
    constants = {name: value for name, value in constants.items() if name in known or name in inputs.constants}

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _plain(original(*args, **kwargs, **constants))

    forward.__signature__ = inspect.signature(functools.partial(original, **constants))  # type: ignore[attr-defined]
    replaced = "forward" in vars(module)
    module.forward = forward
    try:
        yield forward
    finally:
        if replaced:
            module.forward = original
        else:
            del module.forward


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def _in_order(gm: fx.GraphModule, calls: Iterable[AttentionSite | Refusal]) -> list[AttentionSite | Refusal]:
    """The attention calls of a graph, accepted or not, in the order in which they run."""
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    return sorted(calls, key=lambda call: place[call.node])


def _carried_over(graphs: list[Captured], calls: list[AttentionSite | Refusal], recipe: Recipe) -> Plan:
    """The recipe's decisions for the exported calls, under the names that Dynamo gave them.

    Raises:
        RecipeError: the recipe belongs to another model.
        ExportError: the two ways of tracing see different calls.
    """
    known = [(found, inputs, _in_order(found.gm, (*found.sites, *found.refusals))) for found, inputs in graphs]
    count = sum(len(same) for *_, same in known)
    if count != len(calls):
        raise ExportError(
            f"the exported graph has {len(calls)} attention calls and the graphs that Dynamo captures have {count}; "
            "which is which cannot be told, so nothing is exported."
        )
    remaining = iter(calls)
    planned: dict[AttentionSite, SparseCall] = {}
    rows: list[SiteRecipe] = []
    for found, inputs, same in known:
        here = [replace(next(remaining), name=call.name) for call in same]
        plan = _planned(found, inputs, here, recipe)
        planned.update(plan.calls)
        row_of = {row.name: row for row in plan.rows}
        rows += [row_of[call.name] for call in here]
    return Plan(planned, tuple(rows))


def _planned(found: FoundGraph, inputs: list[Any], calls: list[AttentionSite | Refusal], recipe: Recipe) -> Plan:
    """The plan of one graph: its identity is the captured graph's, its calls are the exported ones."""
    sites = [call for call in calls if isinstance(call, AttentionSite)]
    refusals = [call for call in calls if isinstance(call, Refusal)]
    if not found.sites:  # no recipe has constants for such a graph, nor knows its weights
        refusals += [Refusal(site.name, NOT_CALIBRATED, site.node) for site in sites]
        return Plan.of(replace(found, sites=[], refusals=refusals), None)
    try:
        captured = Plan.of(found, recipe)  # whether it belongs to this model, even where nothing is accepted below
        plan = Plan.of(replace(found, sites=sites, refusals=refusals), recipe if sites else None)
    except RecipeError as error:
        raise RecipeError(f"the recipe {error}") from None
    if not captured.differences:
        return plan
    return _as_checked(plan, revalidated(captured, [SampleRun(found.gm, found.sites, inputs)], recipe, "the recipe"))


def _as_checked(plan: Plan, checked: Plan) -> Plan:
    """The plan of the exported calls with what the captured ones were seen to hold."""
    rows = {row.name: row for row in checked.rows}
    held = {site.name: call for site, call in checked.calls.items()}
    calls = {
        site: replace(held[site.name], min_length=call.min_length, max_length=call.max_length)
        for site, call in plan.calls.items()
        if site.name in held
    }
    return replace(plan, calls=calls, rows=tuple(rows.get(row.name, row) for row in plan.rows))


def _expressible(
    plan: Plan, refuse: Refuse, no_fp8: str | None
) -> tuple[dict[AttentionSite, SparseCall], tuple[SiteRecipe, ...]]:
    """The plan without what the format has no form for."""
    if no_fp8 is not None:
        own = {site: call.in_own_precision() for site, call in plan.calls.items()}
        plan = replace(plan, calls=own, rows=tuple(in_own_precision(row, no_fp8) for row in plan.rows))
    reasons = {site.name: refuse(site, call) for site, call in plan.calls.items()}
    rows = tuple(
        replace(row, outcome="dense", reason=reason) if (reason := reasons.get(row.name)) else row for row in plan.rows
    )
    return {site: call for site, call in plan.calls.items() if not reasons[site.name]}, rows


def _results(gm: fx.GraphModule) -> list[str]:
    """Names of the nodes that a graph returns, which the program's signature repeats."""
    return [node.name for node in gm.graph.output_node().all_input_nodes]


def _shapes(
    exported: ExportedProgram, names: Sequence[str], sizes: Mapping[str, str]
) -> dict[str, tuple[int | str, ...]]:
    """The shape of each tensor argument, free sizes by name."""
    values = [
        node.meta["val"]
        for node in exported.graph.find_nodes(op="placeholder")
        if node.name in exported.graph_signature.user_inputs and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    return {
        name: tuple(sizes.get(str(n), str(n)) if (number := fixed(n)) is None else number for n in value.shape)
        for name, value in zip(names, values, strict=True)
    }
