"""ONNX: each sparse call is one node ``afbs::SparseAttention`` with a body in standard operators.

Any runtime that knows ONNX functions runs the file by that body (:mod:`afbs_compile.export.onnx_function`). A runtime
with a kernel of its own claims the node by its name, domain and version, and must then compute what the attributes
``policy``, ``mask``, ``last_rows``, ``local_keys`` and ``predictor_version`` name; it may use ``lam``, which the body
does not.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from afbs_compile.errors import ExportError, OptionError
from afbs_compile.export.files import NOTE, Exported, Note, extra, first_line, target_path
from afbs_compile.export.inputs import Example
from afbs_compile.export.onnx_function import DOMAIN, MASKED_NAME, NAME, VERSION, bodies
from afbs_compile.export.onnx_predict import policy_codes
from afbs_compile.export.program import ExportProgram, rewritten_program
from afbs_compile.export.runner import Runner
from afbs_compile.files import whole_file
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.op import by_name
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from afbs_compile.passes.site import AttentionSite
from afbs_compile.recipe import Recipe

LARGEST_FILE = 2**31
"""Bytes of a protocol buffer."""

OPSETS = range(18, 24)
NO_BOUND = 2**30
"""``upper`` of a mask that hides nothing: no sequence is as long, and sums with it stay within 32 bits."""

FLOATS, FLOAT, INTS, INT, STRINGS, STRING = "FLOATS", "FLOAT", "INTS", "INT", "STRINGS", "STRING"
ATTRIBUTES = {
    "tau": (FLOATS, "per head: share of the predicted mass that the kept key blocks hold; 1 keeps all"),
    "theta": (FLOATS, "per head: a block less self-similar than this is always kept; negative is off"),
    "lam": (FLOATS, "per head: how far (log2) under the running maximum a product with V may be skipped; -1000 is off"),
    "policy": (STRINGS, "per head: the rule that scores and selects the key blocks"),
    "order": (INTS, "the same to the body: the heads that keep everything, then those of each policy"),
    "ends": (INTS, "where in order those that keep everything end, and those of each policy by its number"),
    "mask": (STRING, "what a row sees, by name"),
    "ahead": (INT, "the same to the body: how many keys after its own a row sees"),
    "behind": (INT, "how many keys before its own"),
    "chunk": (INT, "of which chunk it sees keys, its own: so many keys to a chunk"),
    "at_end": (INT, "1 where the last row's own key is the last key, 0 where the first row's is the first"),
    "scale": (FLOAT, "softmax scale"),
    "block_q": (INT, "rows of a query block"),
    "block_k": (INT, "rows of a key block; block_q is a multiple of it"),
    "block_heads": (INT, "neighbouring heads for which a block is live where it is for one of them"),
    "last_rows": (INT, "query blocks that hold one of this many last rows keep every block"),
    "local_keys": (INT, "blocks that hold one of this many keys right before a query block are kept"),
    "min_length": (INT, "shorter sequences keep every block"),
    "max_length": (INT, "longer sequences keep every block; 0 for no limit"),
    "predictor_version": (INT, "version of the selection rule; a native kernel must implement this one"),
}

MASKED_ATTRIBUTES = {
    "softcap": (FLOAT, "scores s become softcap * tanh(s / softcap); 0 for none"),
    "dense": (INT, "1 where attn_mask hides or adds anything that the other inputs do not say"),
    "added": (INT, "1 where attn_mask has other numbers than 0 and -inf"),
    "lowest": (FLOAT, "the number of attn_mask that hides a key from a row which has anything larger"),
}


def to_onnx(
    model: nn.Module | ExportedProgram,
    recipe: Recipe,
    example: Example,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
    opset: int = 20,
) -> Exported:
    """Write the model as an ONNX file with its attention calls made sparse.

    Args:
        model, recipe, example: as in :func:`afbs_compile.export.to_pt2`.
        path: a file name that ends in ``.onnx``; it appears whole or not at all, weights inside (under 2 GB).
        dynamic: leave batch and length, and whatever else the model can, free.
        opset: version of the standard operators, 18 to 23.

    Returns:
        What was written: every attention call with its outcome, and the shapes accepted.

    Raises:
        OptionError: an argument is not accepted.
        RecipeError: the recipe belongs to another model.
        ExportError: the extra ``export`` is missing, or PyTorch cannot translate the model.
        OSError: the file cannot be written.
    """
    target = target_path(path, "onnx")
    if opset not in OPSETS:
        raise OptionError(f"opset: got {opset!r}; accepted: {OPSETS[0]} to {OPSETS[-1]}")
    onnx, *_ = extra(("onnx", "onnxscript"), "export")
    program = rewritten_program(
        model, recipe, example, dynamic=dynamic, refuse=no_form, no_fp8="ONNX has no FP8 form of the call"
    )
    proto = _translated(program, opset)
    proto.functions.extend(bodies(opset, [node for node in proto.graph.node if node.domain == DOMAIN]))
    proto.metadata_props.add(key=NOTE, value=program.note.to_json())
    with whole_file(target) as temporary:
        try:
            onnx.save_model(proto, temporary)
            onnx.checker.check_model(str(temporary), full_check=True)
        except (ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the ONNX file is not valid: {first_line(error)}") from error
    return Exported(target, program.rows, program.inputs)


def no_form(site: AttentionSite, call: SparseCall) -> str | None:
    """Why the body cannot compute a call; None where it can."""
    known = policy_codes()
    if others := sorted(set(call.policy) - set(known)):
        return f"no form in ONNX: policy {', '.join(others)}; {', '.join(known)} have one"
    if _formula(site.mask) is None:
        return f"no form in ONNX: mask {site.mask}; those that are bands aligned at the first or the last key have one"
    return None


def _formula(mask: Mask) -> dict[str, int] | None:
    """A mask as the bodies compute it, if they do: the attributes ``ahead``, ``behind``, ``chunk`` and ``at_end``."""
    found = set()
    for sizes in ((64, 64), (64, 4096), (4096, 64)):
        band, offset = mask.band(*sizes), mask.offset(*sizes)
        if band is None or offset not in (0, sizes[1] - sizes[0]):
            return None
        ahead = band.upper - offset if band.bounded else NO_BOUND
        behind = band.width - 1 - ahead if band.width and not band.chunked else NO_BOUND
        found.add((ahead, behind, band.width if band.chunked else NO_BOUND))
    if len(found) > 1:
        return None
    ((ahead, behind, chunk),) = found
    return {"ahead": ahead, "behind": behind, "chunk": chunk, "at_end": int(mask.offset(64, 4096) != 0)}


def attributes(call: SparseCall, mask: Mask, scale: float) -> dict[str, Any]:
    """The attributes of a node for a call that has a form, but for those of :data:`MASKED_ATTRIBUTES`."""
    formula = _formula(mask)
    assert formula is not None
    return {
        **{name: list(getattr(call, name)) for name in ("tau", "theta", "lam", "policy")},
        **dict(zip(("order", "ends"), _by_policy(call), strict=True)),
        **{"mask": str(mask), **formula, "scale": scale},
        **{"block_q": call.shape.q, "block_k": call.shape.k, "block_heads": call.shape.heads, **call.kept._asdict()},
        **{"min_length": call.min_length, "max_length": call.max_length, "predictor_version": PREDICTOR_VERSION},
    }


def _by_policy(call: SparseCall) -> tuple[list[int], list[int]]:
    """The heads sorted by what selects for them, and where each part of them ends."""
    heads, codes = range(len(call.tau)), policy_codes()
    parts = [[head for head in heads if call.tau[head] >= KEEP_ALL]]
    for number in range(max(codes.values()) + 1):
        parts.append([head for head in heads if head not in parts[0] and codes[call.policy[head]] == number])
    return [head for part in parts for head in part], list(itertools.accumulate(map(len, parts)))


def masked_attributes(attn_mask: torch.dtype | None, softcap: float) -> dict[str, Any]:
    """The attributes that a masked node has beside those.

    Args:
        attn_mask: its dtype, ``None`` where there is none.
    """
    added = None if attn_mask == torch.bool else attn_mask
    lowest = torch.finfo(torch.float32 if added in (None, torch.float64) else added).min
    dense = int(attn_mask is not None)
    return {"softcap": softcap, "dense": dense, "added": int(added is not None), "lowest": lowest}


def schema(name: str) -> Any:
    """The ``onnx.defs.OpSchema`` of a node."""
    from onnx import defs

    kind, parameter = defs.OpSchema.AttrType, defs.OpSchema.FormalParameter
    masked = name == MASKED_NAME
    inputs = [
        parameter("q", "T", "[batch, heads, q_len, head_dim]"),
        parameter("k", "T", "[batch, kv_heads, k_len, head_dim]"),
        parameter("v", "T", "[batch, kv_heads, k_len, value_dim]"),
    ]
    constraints = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")]
    if masked:
        inputs += [
            parameter("valid", "B", "[batch or 1, k_len or 1], the keys that exist"),
            parameter("attn_mask", "M", "[batch or 1, heads or 1, q_len or 1, k_len or 1], added to the scores"),
            parameter("sinks", "M", "[heads or 1], one more logit in the denominator of each row; -inf for none"),
        ]
        constraints += [("B", ["tensor(bool)"], ""), ("M", ["tensor(float)"], "")]
    known = ATTRIBUTES | (MASKED_ATTRIBUTES if masked else {})
    return defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        "Attention over the key blocks that each head's thresholds select.",
        inputs=inputs,
        outputs=[parameter("out", "T", "[batch, heads, q_len, value_dim]")],
        type_constraints=constraints,
        attributes=[
            defs.OpSchema.Attribute(name, getattr(kind, type_name), description)
            for name, (type_name, description) in known.items()
        ],
    )


def _translated(program: ExportProgram, opset: int) -> Any:
    """The model as a ``ModelProto`` whose attention nodes have no body yet."""
    size = sum(t.numel() * t.element_size() for t in program.exported.state_dict.values())
    if size >= LARGEST_FILE:
        raise ExportError(f"the weights take {size / 2**30:.1f} GiB; one ONNX file holds less than 2.")
    translation: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.afbs.sparse_attention.default: _sparse_attention_node()
    }
    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=opset,
                input_names=list(program.note.inputs),
                output_names=_output_names(program.exported),
                custom_translation_table=translation,
            )
            assert exported is not None
            proto = exported.model_proto
    except Exception as error:  # the exporter raises errors of many kinds for what it cannot translate
        raise ExportError(f"torch.onnx cannot translate the model: {first_line(error)}") from error
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if versions[""] != opset:
        raise ExportError(f"torch.onnx wrote opset {versions['']} where {opset} was asked for; ask for that one.")
    _name_sizes(proto, program.sizes)
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress, and its warnings about packages that the model does not use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _name_sizes(proto: Any, names: Mapping[str, str]) -> None:
    """Call free sizes by their names, and the symbols that stand for a number by that number."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param.isdigit():
                size.dim_value = int(size.dim_param)
            elif size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)


def _sparse_attention_node() -> Callable[..., Any]:
    """Translates one call of the torch operator into one node."""
    from onnxscript import values

    opset = values.Opset(DOMAIN, VERSION)
    plain, masked = (values.Op(opset, name, schema(name)) for name in (NAME, MASKED_NAME))

    def sparse_attention(q: Any, k: Any, v: Any, *arguments: Any, **named: Any) -> Any:
        given = by_name(arguments, named)
        call = SparseCall.of_arguments(len(given["tau"]), given)
        told = attributes(call, mask_of(given["mask"]), given["scale"])
        extras = (given["valid"], given["attn_mask"], given["sinks"])
        if extras == (None, None, None) and not given["softcap"]:
            return plain(q, k, v, **told)
        valid, attn_mask, sinks, dtype = _tensors(*extras)
        return masked(q, k, v, valid, attn_mask, sinks, **told, **masked_attributes(dtype, given["softcap"]))

    return sparse_attention


def _tensors(valid: Any, attn_mask: Any, sinks: Any) -> tuple[Any, Any, Any, torch.dtype | None]:
    """The further inputs of a masked node, and the dtype of the dense mask; what is not there changes nothing."""
    import onnx
    from onnxscript import ir
    from onnxscript.onnx_opset import opset18 as op

    floats = {
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
        ir.DataType.DOUBLE: torch.float64,
    }

    def constant(values: Any, shape: Sequence[int], kind: int) -> Any:
        return op.Constant(value=onnx.helper.make_tensor("", kind, shape, [values]))

    single, boolean = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL
    dtype = None if attn_mask is None else torch.float32
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        rows = attn_mask.shape[1:3]
        if tuple(rows) == (1, 1):  # which keys are valid, in another shape
            axes: Any = op.Constant(value_ints=[1, 2])
            by_key = op.Squeeze(attn_mask, axes)
            valid = by_key if valid is None else op.And(valid, by_key)
            attn_mask = dtype = None
        else:
            zero, hidden = (constant(value, (), single) for value in (0.0, -torch.inf))
            attn_mask, dtype = op.Where(attn_mask, zero, hidden), torch.bool
    elif attn_mask is not None:
        dtype = floats[attn_mask.dtype]
        attn_mask = op.Cast(attn_mask, to=single)
    return (
        constant(True, (1, 1), boolean) if valid is None else valid,
        constant(0.0, (1, 1, 1, 1), single) if attn_mask is None else attn_mask,
        constant(-torch.inf, (1,), single) if sinks is None else op.Cast(sinks, to=single),
        dtype,
    )


def _output_names(exported: ExportedProgram) -> list[str]:
    """The keys of a model's output where it is a flat dictionary, else numbered names."""
    spec = exported.call_spec.out_spec
    count = len(exported.graph_signature.user_outputs)
    keys = spec.context if spec is not None and spec.type is dict and spec.num_leaves == count else None
    return [str(key) for key in keys] if keys and len(keys) == count else [f"output_{i}" for i in range(count)]


def load_onnx(path: Path) -> Runner:
    """Load what :func:`to_onnx` wrote, to run with onnxruntime on the CPU."""
    onnx, runtime = extra(("onnx", "onnxruntime"), "export")
    texts = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    note = Note.from_json(texts[NOTE])
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(note.inputs, tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return Runner(note, run)
