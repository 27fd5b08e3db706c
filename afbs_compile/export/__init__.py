"""Files that run without us: a model with its attention calls made sparse, as torch.export, ONNX or TensorRT."""

from afbs_compile.export.files import SUFFIXES, Exported
from afbs_compile.export.load import load
from afbs_compile.export.onnx import to_onnx
from afbs_compile.export.pt2 import to_pt2
from afbs_compile.export.rtx_plugin import register_plugins
from afbs_compile.export.runner import Runner
from afbs_compile.export.tensorrt import to_tensorrt
from afbs_compile.export.tensorrt_rtx import to_tensorrt_rtx

__all__ = [
    "SUFFIXES",
    "Exported",
    "Runner",
    "load",
    "register_plugins",
    "to_onnx",
    "to_pt2",
    "to_tensorrt",
    "to_tensorrt_rtx",
]
