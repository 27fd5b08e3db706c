"""The paper's tables and figures on a real model, at matched sparsity.

    python benchmarks/paper.py                                       all of them, the shipped model, texts that ship
    python benchmarks/paper.py table1 --length 4096 --texts wiki.txt books.txt docs.txt stdlib --name 7m_4k

The first text is calibrated on, by windows that nothing is tested on. Perplexity is that of the second half of each
window's tokens; docs/paper.md says why, and what came out beside what the paper says.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import RESULTS, SHIPPED_MODEL
from paper_parts import figure2, figure3, figure4, gate, section3, table1, table2, table3, table4
from paper_parts.methods import METHODS
from paper_parts.setting import Setting

PARTS = (table1, table2, table3, table4, figure2, figure3, figure4, section3, gate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.NAME for part in PARTS]
    parser.add_argument("parts", nargs="*", choices=[*names, []], help=f"some of {', '.join(names)}; all by default")
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument(
        "--texts", nargs="+", default=["topics", "stdlib"], help="text files, 'topics', or 'stdlib' (Python's code)"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window, a multiple of 64")
    parser.add_argument("--longest", type=int, default=8192, help="of the figures over lengths")
    parser.add_argument("--windows", type=int, default=2, help="of each text to test on")
    parser.add_argument("--prompts", type=int, default=12, help="of each task of table2")
    parser.add_argument("--samples", type=int, default=4, help="windows to calibrate on")
    parser.add_argument(
        "--methods", nargs="+", choices=[method.name for method in METHODS], help="of table1 and table2; all by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of methods that draw random numbers")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="7m", help="end of the result files' names")
    setting = Setting(parser.parse_args())
    chosen = setting.arguments.parts or names
    for part in PARTS:
        if part.NAME in chosen:
            began = time.perf_counter()
            print(f"== {part.NAME}: {(part.__doc__ or '').splitlines()[0]}", flush=True)
            part.run(setting)
            print(f"== {part.NAME} took {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
