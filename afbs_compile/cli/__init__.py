"""The command line ``afbs-compile``: calibrate, inspect, graph, export, verify, bench."""

from afbs_compile.cli.main import main

__all__ = ["main"]
