"""Compile the portable kernel for GPUs that are not here, as Triton's ahead-of-time interface allows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from afbs_compile.kernels.attend.portable.tiling import Chip

KILO = 1024
TOLERATED_SPILLS = 64
"""Bytes a thread; a handful of registers put aside once, outside the loop, cost nothing that can be measured."""

ROOT = Path(__file__).parents[2]


class Target(NamedTuple):
    """A chip.

    Attributes:
        backend, arch, warp: as Triton names them.
        chip: as the launch rule takes it.
    """

    backend: str
    arch: int | str
    warp: int
    chip: Chip


TARGETS = {
    "Ampere sm_80": Target("cuda", 80, 32, Chip(163 * KILO, hopper=False)),
    "Ada sm_89": Target("cuda", 89, 32, Chip(99 * KILO, hopper=False)),
    "Hopper sm_90": Target("cuda", 90, 32, Chip(227 * KILO, hopper=True)),
    "Blackwell sm_100": Target("cuda", 100, 32, Chip(227 * KILO, hopper=False)),
    "AMD gfx942": Target("hip", "gfx942", 64, Chip(64 * KILO, hopper=False)),
}


class Job(NamedTuple):
    """One kernel to compile: a target and what decides its code."""

    target: str
    block_q: int
    block_k: int
    head_dim: int
    dtype: str
    bounded: bool
    uses_lambda: bool
    tile_q: int
    tile_k: int
    warps: int
    stages: int


def compile_one(job: Job) -> dict[str, Any]:
    """Shared memory, registers and spilled bytes of a kernel. Triton must not run its interpreter in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from afbs_compile.kernels.attend.portable.kernel import forward_kernel
    from afbs_compile.kernels.masks.band_triton import BOUNDED, UNBOUNDED

    target = TARGETS[job.target]
    constants = {
        "HEAD_DIM": job.head_dim,
        "DIM_PAD": job.head_dim,
        "BLOCK_Q": job.block_q,
        "BLOCK_K": job.block_k,
        "TILE_Q": job.tile_q,
        "TILE_K": job.tile_k,
        "FORM": BOUNDED if job.bounded else UNBOUNDED,
        "HAS_PARTIAL": job.bounded,
        "HAS_LAMBDA": job.uses_lambda,
        "PRECISION": "tf32x3" if target.backend == "cuda" else "ieee",
        "MASK": 0,
        **dict.fromkeys(("VALID", "CAPPED", "SINKS", "CHANGED", "MAY_BE_BLIND"), False),
    }
    names = forward_kernel.arg_names
    pointers = dict.fromkeys(("query", "key", "value", "out"), f"*{job.dtype}")
    pointers |= dict.fromkeys(("whole_counts", "partial_counts", "indices", "valid", "mask", "sinks"), "*i32")
    floating = ("scale", "natural", "softcap")
    pointers |= {"lam": "*fp32", **dict.fromkeys(floating, "fp32")}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    odd = {*constants, *floating, "heads", "groups", "upper", "width"}
    aligned = [i for i, name in enumerate(names) if name not in odd]
    source = ASTSource(forward_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": job.warps, "num_stages": job.stages}
    kernel = triton.compile(source, GPUTarget(target.backend, target.arch, target.warp), options)
    return {**job._asdict(), "shared_memory": kernel.metadata.shared, **_resources(kernel, target)}


def _resources(kernel: Any, target: Target) -> dict[str, int]:
    if target.backend == "hip":
        found = {
            name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count): *(\d+)", kernel.asm["amdgcn"])
        }
        return {"registers": found["vgpr_count"], "spilled_bytes": 4 * found["vgpr_spill_count"]}
    from triton import knobs

    cubin = Path(kernel.metadata_group[f"{kernel.metadata.name}.cubin"])
    report = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def compile_in_own_process(jobs: list[Job]) -> list[dict[str, Any]]:
    """:func:`compile_one` where Triton compiles: the tests' own process interprets.

    Raises:
        RuntimeError: with what the compiler said.
    """
    code = (
        f"import json; from tests.kernels.targets import *; print(json.dumps([compile_one(job) for job in {jobs!r}]))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records
