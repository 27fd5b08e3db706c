"""The tables and figures of the paper on a real model; ``benchmarks/paper.py`` runs them."""
