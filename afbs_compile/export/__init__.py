"""Files that run without us: a model with its attention calls made sparse, as torch.export, ONNX or TensorRT."""

from afbs_compile.export.files import SUFFIXES, Exported
from afbs_compile.export.load import load
from afbs_compile.export.onnx import to_onnx
from afbs_compile.export.pt2 import to_pt2
from afbs_compile.export.runner import Runner
from afbs_compile.export.tensorrt import to_tensorrt

__all__ = ["SUFFIXES", "Exported", "Runner", "load", "to_onnx", "to_pt2", "to_tensorrt"]
