"""Triton runs in its interpreter where there is no GPU; that has to be decided before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A silent fall to the slow path is a failure everywhere but where it is the subject."""
    for item in items:
        if "tests/kernels/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("error::afbs_compile.kernels.flex.UnfusedAttentionWarning"))


@pytest.fixture(scope="session", autouse=True)
def interpreter_multiplies_bf16() -> None:
    """Triton's interpreter keeps bf16 as 16-bit integers and multiplies those: give its dot product the numbers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot = InterpreterBuilder.create_dot

    def widen(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain_dot(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot
