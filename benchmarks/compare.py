"""Compare two states of the project by the files that ``benchmarks/kernels.py --json`` wrote on one machine.

    python benchmarks/compare.py --before b1.json b2.json --after a1.json a2.json

For each row of each case: the median over the files of each side, in ms, and their ratio. Runs of the two sides should
alternate, so that the chip's temperature and clock favour neither.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import median


def times(files: list[Path]) -> dict[tuple[str, str, str], float]:
    """The median time of each row over the files, by case, engine and block shape."""
    found = defaultdict(list)
    for file in files:
        for case in json.loads(file.read_text(encoding="utf-8"))["cases"]:
            for row in case["rows"]:
                if "ms" in row:
                    found[case["name"], row["engine"], row.get("blocks", "")].append(row["ms"])
    return {row: median(values) for row, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="+", required=True)
    parser.add_argument("--after", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    before, after = times(options.before), times(options.after)
    ratios = [(after[row] / before[row], *row) for row in before.keys() & after.keys()]
    for ratio, case, engine, blocks in sorted(ratios, key=lambda line: line[1:]):
        row = (case, engine, blocks)
        print(f"{case:16} {engine:32} {blocks:8} {before[row]:8.3f} -> {after[row]:8.3f} ms  {ratio:.3f}")
    for row in sorted(before.keys() ^ after.keys()):
        print(f"{' '.join(row)}: on one side only")
    mean = math.exp(sum(math.log(line[0]) for line in ratios) / len(ratios))
    extremes = f"{min(ratios)[0]:.3f} to {max(ratios)[0]:.3f}"
    print(f"{len(ratios)} rows: after / before is {mean:.3f} in the geometric mean, {extremes}")


if __name__ == "__main__":
    main()
