"""The policies by name; of those that calibration explores the cheapest predictor comes first."""

from __future__ import annotations

import functools

from afbs_compile.errors import shown
from afbs_compile.kernels.policies.antidiagonal import Antidiagonal
from afbs_compile.kernels.policies.base import Policy
from afbs_compile.kernels.policies.cumulant import Cumulant
from afbs_compile.kernels.policies.meanshare import MeanShare
from afbs_compile.kernels.policies.meansim import MeanSim
from afbs_compile.kernels.policies.sampled import Sampled
from afbs_compile.kernels.policies.sink_window import SinkWindow
from afbs_compile.kernels.policies.vertical_slash import VerticalSlash

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (MeanSim(), MeanShare(), Cumulant(), Antidiagonal(), VerticalSlash(), SinkWindow(), Sampled())
}
"""To add one, write it in a file of its own and name it last, for ONNX files know policies by their place; code outside
the package adds an entry."""

UNNAMED = MeanSim.name
"""The policy of an operator call that names none."""


def policy_named(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"policy is {shown(name)}; accepted: {', '.join(POLICIES)}")
    return POLICIES[name]


@functools.lru_cache(maxsize=256)  # asked at every call
def heads_by(names: tuple[str, ...]) -> dict[str, list[int]]:
    """The heads that have each name (of a policy, of a precision), by name, in order of first use."""
    return {name: [h for h, mine in enumerate(names) if mine == name] for name in dict.fromkeys(names)}
