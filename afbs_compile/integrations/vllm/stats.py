"""What was computed how, since this process started or :func:`reset` was called."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Stats:
    """Counts of one process.

    Attributes:
        sparse: requests that a layer computed sparsely; dense: long ones that it left to vLLM.
        rest: calls of vLLM's own backend on what is left of a batch of which a part was sparse.
        gathered_bytes: keys and values copied out of pages; gather_seconds: what the host spent on it, which on a GPU
            is the launching alone.
    """

    sparse: int = 0
    dense: int = 0
    rest: int = 0
    gathered_bytes: int = 0
    gather_seconds: float = 0.0


STATS = Stats()


def reset() -> None:
    """Start to count anew."""
    for field in fields(Stats):
        setattr(STATS, field.name, field.default)
