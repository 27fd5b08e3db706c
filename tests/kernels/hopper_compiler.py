"""What the compiler makes of the Hopper kernels where there is no such GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# A driver that stands for a Hopper GPU: launches of the kernels given to ``only_compile`` go no further.
PRELUDE = """
import re, subprocess, tempfile
from dataclasses import replace
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Hopper())
from afbs_compile.kernels.attend.hopper import engine, kernel, launch
from afbs_compile.kernels.attend.hopper_fp8 import kernel as fp8_kernel, launch as fp8_launch, rounding
from afbs_compile.kernels.operands import empty_output
from tests.kernels.helpers import Shape, every_block, listed, operands_of

engine.processors = launch.processors = lambda device: 132

def disassembled(cubin):
    # Triton's own listing ends at the first address of five digits: after 4096 instructions.
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-sass", file.name], text=True)
    return "\\n".join(re.findall(r"/\\*[0-9a-f]{4,}\\*/ +(.*?;)", listing))

def only_compile(*kernels):
    for kernel in kernels:
        def compiling(*args, run=kernel.run, name=kernel.__name__, warmup, **kwargs):
            compiled = run(*args, warmup=True, **kwargs)
            print(f"=== {name} {shape} grid {kwargs['grid']} shared {compiled.metadata.shared}")
            print(disassembled(compiled.asm["cubin"]))
        kernel.run = compiling

def attend_by(launched, k_len=None, valid=False):
    operands, keys = operands_of(shape), operands_of(replace(shape, length=k_len or shape.length))
    exists = torch.ones(shape.batch, keys.k_len, dtype=torch.bool) if valid else None
    operands = replace(operands, k=keys.k, v=keys.v, valid=exists)
    visible = operands.mask.visibility(operands.grid(shape.block_shape), operands.device).visible
    lists = listed(visible.expand(shape.batch, shape.heads, -1, -1), operands, shape.blocks)
    launched.attend(operands, every_block(shape), lists, empty_output(operands.q, operands.v))
"""


def compiled_on_hopper(script: str) -> list[tuple[str, str]]:
    """Run a script after :data:`PRELUDE` in another process.

    Args:
        script: calls ``only_compile`` and, with ``shape`` set, ``attend_by`` or whatever else launches kernels.

    Returns:
        Of every launch a title, which ends with ``grid (..) shared BYTES``, and the SASS.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    cases = (case.partition("\n") for case in run.stdout.split("=== ")[1:])
    return [(title, sass) for title, _, sass in cases]
