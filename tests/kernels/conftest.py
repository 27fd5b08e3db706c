"""Fixtures of the kernels' tests."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A silent fall to the slow path is a failure everywhere but where it is the subject."""
    for item in items:
        if "tests/kernels/" in item.path.as_posix():
            item.add_marker(
                pytest.mark.filterwarnings("error::afbs_compile.kernels.attend.flex.engine.UnfusedAttentionWarning")
            )


@pytest.fixture(scope="session", autouse=True)
def interpreter_knows_bf16() -> None:
    """Triton's interpreter keeps bf16 as 16-bit integers: it multiplies those and truncates on the way there.

    Here it rounds to nearest, as GPUs do, and multiplies the numbers; FP8 is rounded to nearest and clamped.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    plain_fp = InterpreterBuilder.create_fp_to_fp

    def cast_impl(self, source, target):
        kinds = (source.dtype.scalar, target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(torch.from_numpy(source.data).view(torch.bfloat16).float().numpy(), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
        return plain_cast(self, source, target)

    def create_dot(self, a, b, *rest):
        a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return plain_dot(self, a, b, *rest)

    def create_fp_to_fp(self, source, target, mode):
        if target.scalar != tl.float8e4nv:
            return plain_fp(self, source, target, mode)
        rounded = torch.from_numpy(source.data).clamp(-448, 448).to(torch.float8_e4m3fn)
        return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
