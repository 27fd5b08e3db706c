"""``make matrix``: the fast tests on the oldest and the newest supported torch, on two releases of Python."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False  # skipped, and nox says which

PYTHONS = ("3.11", "3.13")
TORCHES = ("2.11", "2.14")
FOLLOW_TORCH = ("torch==", "triton==", "numpy==")
"""Pins of constraints.txt that hold for its own release of torch alone."""

NUMPY = {"2.11": "numpy<2.4"}
"""The interpreter of Triton 3.6, which comes with torch 2.11, makes Python scalars of arrays that numpy 2.4 refuses."""

UNRESOLVED = ("No matching distribution found", "ResolutionImpossible")
"""What pip says where there are no packages for a combination; whatever else goes wrong is a failure."""


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """Install with one release of torch and run what ``make test`` runs; arguments after ``--`` are pytest's."""
    pins = Path(session.create_tmp()).resolve() / "constraints.txt"
    kept = [line for line in Path("constraints.txt").read_text().splitlines() if not line.startswith(FOLLOW_TORCH)]
    pins.write_text("\n".join([*kept, f"torch=={torch}.*", NUMPY.get(torch, "numpy>=2"), ""]))
    install = ("python", "-m", "pip", "install", "-c", str(pins), "-e", ".[dev]")
    said = str(session.run(*install, silent=True, success_codes=(0, 1)))
    begin = said.find("ERROR:")
    if begin >= 0:
        session.log(said[begin:])
        if any(words in said for words in UNRESOLVED):
            session.skip(f"torch {torch} on Python {session.python} does not resolve here")
        session.error(f"torch {torch} on Python {session.python} could not be installed")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow", *session.posargs)
