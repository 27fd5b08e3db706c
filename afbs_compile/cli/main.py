"""Parse the command line, run one command, and turn what the user got wrong into one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from afbs_compile.cli import bench, calibrate, export, graph, inspect, verify
from afbs_compile.errors import AfbsError
from afbs_compile.version import __version__

COMMANDS = (calibrate, inspect, graph, export, verify, bench)
"""In the order of ``--help``; each module has ``NAME``, ``add(parser)`` and ``run(arguments) -> exit code``."""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
MODEL is one of
  a Hugging Face folder or id       AutoModelForCausalLM where its config says so, else AutoModel
  package.module:factory            a callable without arguments that returns the module
  model.pt2                         a file of torch.export

SRC is one of
  a text file, or a folder of them  tokenised, cut into K disjoint windows of N tokens
  .jsonl, .json, .csv, .parquet     records; the text is in the column that --text-column names
  NAME[:CONFIG]:SPLIT[COLUMN]       of the datasets library, e.g. 'wikitext:wikitext-2-raw-v1:validation[text]'
  inputs.npz, .pt or .safetensors   tensors by the names of the forward's arguments
  random                            inputs of the right shape: for speed and smoke tests, not for thresholds

exit codes: 0 done, 1 a check failed, 2 something was wrong with what was given
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``afbs-compile``.

    Args:
        argv: arguments without the program's name; by default the process's.

    Returns:
        0, or 1 where a check of ``verify`` failed, or 2 with one sentence on standard error where something was
        wrong with what the user gave. Any other error is a bug and keeps its traceback.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, e.g. `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print(f"afbs-compile {arguments.command}: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        print(f"afbs-compile {arguments.command}: {' '.join(str(refusal).split())}", file=sys.stderr)
        return USAGE


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage of all options around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="afbs-compile",
        description="Make a model's attention sparse, offline: calibrate once, read what was decided, ship a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"afbs-compile {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        summary = _first_line(command)
        sub = commands.add_parser(
            command.NAME,
            help=summary,
            description=(command.__doc__ or "").strip(),
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(sub)
        sub.set_defaults(run=command.run)
    return parser


def _first_line(command: Any) -> str:
    return str(command.__doc__).strip().splitlines()[0].rstrip(".")


def _refusal(error: BaseException) -> AfbsError | None:
    """The sentence behind an error, which Dynamo may have wrapped in its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, AfbsError):
            return seen
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return None
