"""The command line ``afbs-compile``: calibrate, inspect, graph, export, verify, bench."""
