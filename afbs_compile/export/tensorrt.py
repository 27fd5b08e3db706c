"""TensorRT through torch-tensorrt: a program whose parts are serialised engines, each sparse call a plugin in them.

The plugin is a Quick Deployable Plugin that torch-tensorrt generates from a PyTorch operator. Its generator takes
tensors, numbers and strings, neither lists nor optional values, and it asks the operator for its shape with sizes of
its own choice; so the plugin has an operator to itself, ``afbs::sparse_attention_plugin``, which takes everything but
the tensors as one text and checks nothing until it runs. Another one, ``afbs::masked_sparse_attention_plugin``, also
takes the tensors that not every call has: valid keys, a dense mask, sinks. The process that runs the file imports this
module first (:func:`afbs_compile.export.load` does): the plugins call back into Python.

TensorRT can also embed a compiled kernel in the engine (``tensorrt.plugin.aot_impl``), so that no Python runs. That
interface launches one kernel per plugin and gives it no memory to work in; a sparse call is several kernels (block
statistics, scores, selection, attention) with block lists between them, so it does not fit.

Nothing below the calls of torch-tensorrt was ever run by this project: no engine was built, saved, loaded or timed.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from afbs_compile.errors import ExportError
from afbs_compile.export.files import NOTE, Exported, Note, extra, first_line, target_path
from afbs_compile.export.inputs import Example, ExportInputs
from afbs_compile.export.program import rewritten_program
from afbs_compile.export.runner import Runner, call_as_exported
from afbs_compile.files import whole_file
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.op import arguments_of, by_name, sparse_attention
from afbs_compile.recipe import Recipe

PLUGIN, MASKED_PLUGIN = "afbs::sparse_attention_plugin", "afbs::masked_sparse_attention_plugin"

EXTRAS = ("valid", "attn_mask", "sinks")
"""The tensors that not every call has."""


def to_tensorrt(
    model: nn.Module | ExportedProgram,
    recipe: Recipe,
    example: Example,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
) -> Exported:
    """Write the model as TensorRT engines with its attention calls made sparse.

    Args:
        model, recipe, example: as in :func:`afbs_compile.export.to_pt2`, on a CUDA device.
        path: a file name that ends in ``.ep``; it appears whole or not at all.
        dynamic: accept every batch and length from 1 to the example's, for which the engines are built.

    Returns:
        What was written: every attention call with its outcome, and the shapes accepted.

    Raises:
        OptionError: an argument is not accepted.
        RecipeError: the recipe belongs to another model.
        ExportError: the extra ``tensorrt`` is missing, or torch-tensorrt cannot build the engines.
        OSError: the file cannot be written.
    """
    target = target_path(path, "tensorrt")
    (torch_tensorrt,) = extra(("torch_tensorrt",), "tensorrt")
    no_fp8 = "the TensorRT plugin takes no FP8 heads"
    program = rewritten_program(model, recipe, example, dynamic=dynamic, no_fp8=no_fp8)
    call_plugins(program.exported.graph_module)
    shown = ExportInputs.of(program.module, example).tensors
    ranges = [
        _range(torch_tensorrt, name, program.inputs[name], value)
        for name, value in zip(program.note.inputs, shown, strict=True)
    ]
    positional = program.note.positional
    try:
        register_plugin()
        built = torch_tensorrt.dynamo.compile(
            program.exported,
            arg_inputs=tuple(ranges[:positional]),
            kwarg_inputs=dict(zip(program.note.inputs[positional:], ranges[positional:], strict=True)),
            min_block_size=1,  # an engine also for the few operators between two attention calls
        )
        with whole_file(target) as temporary:
            torch_tensorrt.save(
                built,
                str(temporary),
                output_format="exported_program",
                retrace=False,
                extra_files={NOTE: program.note.to_json()},
            )
    except (OSError, ExportError):
        raise
    except Exception as error:  # torch-tensorrt raises errors of many kinds
        raise ExportError(f"torch-tensorrt cannot build the engines: {first_line(error)}") from error
    return Exported(target, program.rows, program.inputs)


def _range(torch_tensorrt: Any, name: str, shape: Sequence[int | str], value: Tensor) -> Any:
    """The sizes that an input may have: free ones from 1 to the example's."""
    if all(isinstance(size, int) for size in shape):
        return torch_tensorrt.Input(shape=tuple(shape), dtype=value.dtype, name=name)
    largest = tuple(value.shape)
    smallest = tuple(size if isinstance(size, int) else 1 for size in shape)
    return torch_tensorrt.Input(min_shape=smallest, opt_shape=largest, max_shape=largest, dtype=value.dtype, name=name)


def call_plugins(gm: fx.GraphModule) -> int:
    """Replace each sparse call of a graph by the operator that its plugin is generated from.

    All arguments go by position: the converter that torch-tensorrt generates reads no others.

    Returns:
        How many calls were replaced.
    """
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.afbs.sparse_attention.default)
    for node in calls:
        given = by_name(node.args[3:], node.kwargs)
        if "fp8" in (given["precision"] or ()):
            raise ExportError("TensorRT: the plugin takes no heads in FP8.")
        if not isinstance(given["scale"], float):
            raise ExportError("TensorRT: the softmax scale of an attention call is computed in the graph.")
        call = SparseCall.of_arguments(len(given["tau"]), given)
        told = arguments_of(call, mask_of(given["mask"]), given["scale"])
        told |= {"softcap": given["softcap"]} if given["softcap"] else {}
        there = [name for name in EXTRAS if given[name] is not None]
        # In place, for the program's signature knows the results by the names of their nodes.
        if there:
            # The plugin has a fixed number of inputs: q stands in for those that the call has not.
            extras = [given[name] if name in there else node.args[0] for name in EXTRAS]
            node.target = torch.ops.afbs.masked_sparse_attention_plugin.default
            node.args = (*node.args[:3], *extras, json.dumps(told | {"given": there}))
        else:
            node.target = torch.ops.afbs.sparse_attention_plugin.default
            node.args = (*node.args[:3], json.dumps(told))
        node.kwargs = {}
        node.meta["val"] = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
    gm.recompile()
    return len(calls)


@torch.library.custom_op(PLUGIN, mutates_args=())
def sparse_attention_plugin(q: Tensor, k: Tensor, v: Tensor, arguments: str = "") -> Tensor:
    """``afbs::sparse_attention`` with its other arguments as JSON and a contiguous result.

    The default is never used: torch-tensorrt before 2.13 asks for the shape with the tensors alone.

    Raises:
        ValueError: as the operator it calls.
    """
    result: Tensor = sparse_attention(q, k, v, **json.loads(arguments)).contiguous()
    return result


@sparse_attention_plugin.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, arguments: str = "") -> Tensor:
    """The shape of the result, unchecked: the generator asks with sizes that no attention has."""
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op(MASKED_PLUGIN, mutates_args=())
def masked_sparse_attention_plugin(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, attn_mask: Tensor, sinks: Tensor, arguments: str = ""
) -> Tensor:
    """The same for a call that has some of the further tensors: the text says which, the others may be anything.

    Raises:
        ValueError: as the operator it calls.
    """
    told = json.loads(arguments)
    given = told.pop("given")
    extras = {name: x for name, x in zip(EXTRAS, (valid, attn_mask, sinks), strict=True) if name in given}
    result: Tensor = sparse_attention(q, k, v, **told, **extras).contiguous()
    return result


@masked_sparse_attention_plugin.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, attn_mask: Tensor, sinks: Tensor, arguments: str = "") -> Tensor:
    """The shape of the result, unchecked."""
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@functools.cache
def register_plugin() -> None:
    """Have torch-tensorrt generate the plugins and their converters, once."""
    plugins, *_ = extra(("torch_tensorrt.dynamo.conversion.plugins",), "tensorrt")
    for name in (PLUGIN, MASKED_PLUGIN):
        plugins.custom_op(name, supports_dynamic_shapes=True)


def load_tensorrt(path: Path) -> Runner:
    """Load what :func:`to_tensorrt` wrote."""
    (torch_tensorrt,) = extra(("torch_tensorrt",), "tensorrt")
    register_plugin()
    note = Note.in_archive(path)
    module = torch_tensorrt.load(str(path)).module()
    return Runner(note, lambda tensors: call_as_exported(module, note, tensors))
