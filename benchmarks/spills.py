"""What compilers make of every launch shape of the portable kernel, for GPUs that need not be here.

    python benchmarks/spills.py                         all targets, a few minutes
    python benchmarks/spills.py --targets "Ada sm_89"

Prints registers, spilled bytes and shared memory, and fails where a first choice spills more than 64 bytes a thread
(fp32 at head_dim 256 aside, which no tile saves) or asks for more shared memory than the chip has.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parent.parent))

from common import RESULTS, save, settings
from kernel_sections import BLOCKS

from afbs_compile.kernels.attend.portable.tiling import candidates
from tests.kernels.targets import TARGETS, TOLERATED_SPILLS, Job, compile_one

DIMS = (64, 128, 256)
ITEMSIZES = {"bf16": 2, "fp32": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="spills", help="name of the result file")
    arguments = parser.parse_args()
    records = [record for name in arguments.targets for record in report(name)]
    save(arguments.name, arguments.out, {"settings": settings(arguments), "kernels": records})
    if any(record["refused"] for record in records):
        raise SystemExit("a first choice spills, or does not fit")


def report(name: str) -> list[dict[str, object]]:
    """Every launch shape for one target; each is compiled once, for the largest block that uses it."""
    seen, records = set(), []
    chip = TARGETS[name].chip
    for dtype, itemsize in ITEMSIZES.items():
        for dim in DIMS:
            for blocks in BLOCKS:
                for rank, shape in enumerate(candidates(blocks, dim, itemsize, chip)):
                    if (dtype, dim, shape) in seen:
                        continue
                    seen.add((dtype, dim, shape))
                    record = compile_one(Job(name, *blocks, dim, dtype, True, False, *shape))
                    too_large = record["shared_memory"] > chip.shared_memory
                    spills = record["spilled_bytes"] > TOLERATED_SPILLS and (dtype, dim) != ("fp32", 256)
                    record["refused"] = rank == 0 and (too_large or spills)
                    print(
                        f"{name:17} {dtype} d{dim:<3} {blocks!s:7} tile {shape.tile_q}x{shape.tile_k:<3} "
                        f"{shape.warps} warps {shape.stages} stages: {record['registers']:3} registers, "
                        f"{record['spilled_bytes']:4} bytes spilled, {record['shared_memory'] >> 10} of "
                        f"{chip.shared_memory >> 10} KiB{'  REFUSED' if record['refused'] else ''}",
                        flush=True,
                    )
                    records.append(record)
    return records


if __name__ == "__main__":
    main()
