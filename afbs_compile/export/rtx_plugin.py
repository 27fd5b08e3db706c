"""The nodes of an ONNX file as plugins of TensorRT for RTX, which compute them by this package's operator.

TensorRT's parser finds the creators by the names of the nodes and their domain, hands them the attributes, and writes
into the engine what ``get_fields_to_serialize`` returns: the operator's arguments as one text. The process that runs
the engine calls :func:`register_plugins` first; then TensorRT calls back into Python. TensorRT for RTX 1.7 takes
plugins of ``IPluginCreatorV3One`` alone: none whose kernels are compiled into the engine.

Tested without a GPU: all that a builder asks, and :func:`compute` on the CPU. Never run: ``enqueue``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from afbs_compile.export.files import extra
from afbs_compile.export.onnx_function import DOMAIN, MASKED_NAME, NAME
from afbs_compile.kernels.op import sparse_attention

VERSION = "1"
"""The parser asks for this version where a node names none."""

TEXT = "arguments"
"""The field of a plugin in an engine."""

NUMBERS = ("scale", "block_q", "block_k", "block_heads", "min_length", "max_length", "last_rows", "local_keys")
LISTS = ("tau", "theta", "lam")
TEXTS = ("policy", "mask")
MASKED_NUMBERS = ("softcap", "dense")


def arguments_of_fields(fields: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    """The operator's arguments from the attributes of a node.

    Args:
        fields: arrays by name; texts as bytes, several ones with a 0 after each.
        masked: whether it is a node with further tensors.

    Returns:
        What JSON can hold; ``given`` are the names of the tensors that the node has beside q, k and v.
    """
    told: dict[str, Any] = {name: fields[name].item() for name in NUMBERS}
    told |= {name: fields[name].tolist() for name in LISTS}
    policies, mask = (bytes(fields[name].tolist()).decode().rstrip("\0").split("\0") for name in TEXTS)
    told |= {"policy": policies, "mask": mask[0], "given": []}
    if masked:
        told["given"] = ["valid", "sinks"] + ["attn_mask"] * int(fields["dense"].item())
        told |= {"softcap": fields["softcap"].item()} if fields["softcap"].item() else {}
    return told


def compute(text: str, tensors: Sequence[Tensor], out: Tensor) -> None:
    """Write a call's result into a tensor.

    Args:
        text: what :func:`arguments_of_fields` returns, as JSON.
        tensors: q, k, v, and of a masked node valid, attn_mask and sinks.
        out: contiguous ``[B, H, q_len, D_v]``.
    """
    told = json.loads(text)
    given = told.pop("given")
    q, k, v, *further = tensors
    named = dict(zip(("valid", "attn_mask", "sinks"), further, strict=False))
    extras = {name: named[name] for name in given}
    if "sinks" in extras:
        extras["sinks"] = extras["sinks"].expand(q.shape[1]).contiguous()
    if "valid" in extras:
        extras["valid"] = extras["valid"].expand(q.shape[0], k.shape[2])
    out.copy_(sparse_attention(q, k, v, **told, **extras))


@functools.cache
def register_plugins() -> tuple[Any, ...]:
    """Tell TensorRT for RTX of the plugins, once in a process.

    Returns:
        The creators, which must live as long as they are registered.

    Raises:
        ExportError: the extra ``tensorrt-rtx`` is missing.
    """
    (trt,) = extra(("tensorrt_rtx_bindings",), "tensorrt-rtx")
    creators = tuple(_creator(trt, name) for name in (NAME, MASKED_NAME))
    for creator in creators:
        trt.get_plugin_registry().register_creator(creator, DOMAIN)
    return creators


def _creator(trt: Any, node: str) -> Any:
    masked = node == MASKED_NAME
    plugin = _plugin_class(trt, node)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = node, DOMAIN, VERSION
            self.field_names = trt.PluginFieldCollection(_fields(trt, masked))
            self.made: list[Any] = []  # TensorRT does not keep what Python makes

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            values = {field.name: field.data for field in fields}
            if TEXT in values:  # of an engine
                text = bytes(values[TEXT].tolist()).decode()
            else:
                text = json.dumps(arguments_of_fields(values, masked))
            self.made.append(plugin(text))
            return self.made[-1]

    return Creator()


def _fields(trt: Any, masked: bool) -> list[Any]:
    """What a creator wants to be told."""
    import numpy as np

    kinds = dict.fromkeys(LISTS, trt.PluginFieldType.FLOAT32) | dict.fromkeys(TEXTS, trt.PluginFieldType.CHAR)
    kinds |= dict.fromkeys(NUMBERS, trt.PluginFieldType.INT32) | {"scale": trt.PluginFieldType.FLOAT32}
    kinds |= {"softcap": trt.PluginFieldType.FLOAT32, "dense": trt.PluginFieldType.INT32} if masked else {}
    return [trt.PluginField(name, np.array([]), kind) for name, kind in kinds.items()]


def _plugin_class(trt: Any, node: str) -> Any:
    parts = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*parts):  # type: ignore[misc]
        def __init__(self, text: str) -> None:
            for part in parts:
                part.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = node, DOMAIN, VERSION
            self.num_outputs = 1
            self.text = text
            self.copies: list[Any] = []

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            self.copies.append(Plugin(self.text))
            return self.copies[-1]

        def get_output_data_types(self, kinds: Sequence[Any]) -> list[Any]:
            return [kinds[0]]

        def get_output_shapes(self, shapes: Sequence[Any], shape_inputs: Any, expressions: Any) -> list[Any]:
            q, _, v, *_ = shapes
            out = trt.DimsExprs(4)
            for axis in range(3):
                out[axis] = q[axis]
            out[3] = v[3]
            return [out]

        def supports_format_combination(self, position: int, described: Sequence[Any], inputs: int) -> bool:
            """Contiguous tensors; q, k, v and the result of one floating dtype."""
            here = described[position].desc
            if here.format != trt.TensorFormat.LINEAR:
                return False
            if position == 0:
                return here.type in (trt.float32, trt.float16, trt.bfloat16)
            if position in (1, 2, inputs):
                return bool(here.type == described[0].desc.type)
            return bool(here.type == (trt.bool if position == 3 else trt.float32))

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            """Nothing is prepared."""

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Nor at run time."""

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0

        def get_fields_to_serialize(self) -> Any:
            self.written = self.text.encode()  # kept: TensorRT reads it later
            return trt.PluginFieldCollection([trt.PluginField(TEXT, self.written, trt.PluginFieldType.CHAR)])

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def enqueue(self, inputs: Any, outputs: Any, pointers: Any, results: Any, workspace: int, stream: int) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                tensors = [_at(trt, pointer, desc) for pointer, desc in zip(pointers, inputs, strict=True)]
                compute(self.text, tensors, _at(trt, results[0], outputs[0]))

    return Plugin


def _at(trt: Any, pointer: int, described: Any) -> Tensor:
    """The tensor on the current GPU at an address."""
    # The interface of arrays knows no bfloat16.
    codes = {
        trt.float32: ("<f4", torch.float32), trt.float16: ("<f2", torch.float16),
        trt.bfloat16: ("<i2", torch.bfloat16), trt.bool: ("|b1", torch.bool),
    }  # fmt: skip
    code, dtype = codes[described.type]
    interface = {"data": (pointer, False), "shape": tuple(described.dims), "typestr": code, "version": 3}
    array = type("Array", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(array, device="cuda").view(dtype)
