"""The Hopper kernel without a GPU: when it may be used, and what the compiler makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from afbs_compile.kernels import hopper
from tests.kernels.helpers import NO_SKIP

OFF = [NO_SKIP] * 4


def operands(length: int = 300, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.zeros(2, heads, length, dim, dtype=dtype) for heads in (4, 2, 2)]


def refusal(tensors: list[torch.Tensor], lam: list[float] = OFF, blocks: tuple[int, int] = (128, 128)) -> str | None:
    return hopper.refusal(*tensors, lam, *blocks)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)


def test_other_devices_are_refused() -> None:
    assert refusal(operands()) == "cpu is no NVIDIA GPU of compute capability 9.x"


@pytest.mark.usefixtures("on_hopper")
def test_what_it_takes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for dim in (64, 128):
            for blocks in ((128, 128), (128, 64)):
                assert refusal(operands(dim=dim, dtype=dtype), blocks=blocks) is None
    as_models_have_it = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands()]
    assert refusal(as_models_have_it) is None
    assert refusal(operands(length=1)) is None


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("reason", "case"),
    [
        ("dtype is torch.float32; accepted", {"tensors": operands(dtype=torch.float32)}),
        ("head_dim is 96; accepted", {"tensors": operands(dim=96)}),
        ("blocks are 64x64; accepted: 128x128, 128x64", {"tensors": operands(), "blocks": (64, 64)}),
        ("lam is .*; accepted: at most -1000", {"tensors": operands(), "lam": [NO_SKIP, -8.0, NO_SKIP, NO_SKIP]}),
        ("k starts at .* multiples of 16 bytes", {"tensors": [operands()[0], operands(301)[1][:, :, :, 1:], None]}),
        ("q starts at .* the last stride 1", {"tensors": [operands(dim=256)[0][..., ::2], None, None]}),
        ("q starts at .* the others positive", {"tensors": [operands(1)[0].expand(2, 4, 300, 128), None, None]}),
        ("q starts at", {"tensors": [torch.zeros(2, 4, 300, 132, dtype=torch.half)[..., :128], None, None]}),
    ],
)
def test_what_it_refuses_and_why(reason: str, case: dict[str, Any]) -> None:
    case["tensors"] = [x if x is not None else operands()[2] for x in case["tensors"]]
    if case["tensors"][1].shape[3] == 127:  # one column in: the address is no multiple of 16
        case["tensors"][1] = torch.zeros(2, 2, 300, 136, dtype=torch.bfloat16)[..., 1:129]
    said = refusal(**case)
    assert said is not None
    assert re.search(reason, said)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from afbs_compile.kernels import hopper
from afbs_compile.kernels.hopper_kernel import forward_kernel

for dtype, dim, block_k, causal in (("bf16", 128, 128, False), ("fp16", 128, 64, True)):
    constants = dict(HEAD_DIM=dim, BLOCK_Q=128, BLOCK_K=block_k, STAGES=hopper.STAGES, CAUSAL=causal,
                     CONSUMER_REGISTERS=hopper.CONSUMER_REGISTERS, PRODUCER_REGISTERS=hopper.PRODUCER_REGISTERS)
    copies = {"query_desc": (64, dim), "key_desc": (block_k, 64), "value_desc": (block_k, 64)}
    types = {"out": "*" + dtype, "scale": "fp32", "steep": "fp32"}
    types |= dict.fromkeys(("counts", "indices", "counter"), "*i32")
    for name, (rows, columns) in copies.items():
        types[name] = f"tensordesc<{dtype}[1, 1, {rows}, {columns}],{hopper._copy_layout(rows, columns)!r}>"
    names = forward_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = GluonASTSource(forward_kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    kernel = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(f"=== {dtype} {dim} {block_k} {causal} {kernel.metadata.shared}")
    print(kernel.asm["sass"])
"""


def test_the_compiled_kernel_keeps_its_promises() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    cases = run.stdout.split("=== ")[1:]
    assert len(cases) == 2
    for case in cases:
        title, sass = case.split("\n", 1)
        assert int(title.split()[-1]) <= 227 << 10, title
        assert "HGMMA" in sass, title
        # Registers spilt to memory cost more than the whole design gains.
        assert not re.search(r"\b(LDL|STL)\b", sass), title
        # The softmax of a step runs while the product with V does: its exponentials, 64 a thread, stand between the
        # wait for the scores and the wait for that product. (With two masks, one consumer's loop lies in two pieces.)
        between = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR\.LE gsb0, 0x0", sass, re.DOTALL)
        assert sum(part.count("MUFU.EX2") >= 64 for part in between) == (1 if "64 True" in title else 2), title
