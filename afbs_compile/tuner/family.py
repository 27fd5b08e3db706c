"""The family of operating points that one threshold moves along: the policy and block shape that all sites share.

A threshold means the same everywhere only where scores and blocks are made alike. So they are chosen once for a graph:
by the time that its sites would take at an equal error, the predictor's included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.tuner.explore import measured_at_crossing
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.measure import nothing_to_skip
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.speed import Stopwatch
from afbs_compile.tuner.validate import DECIMALS

EQUAL_ERROR = 0.1
"""Relative L1 of each head at which families are compared: about what +1 % of perplexity does to them."""

EXPLORED_SITES = 4
"""Sites that are explored, spread over the graph: their kinds differ little, and each costs a pass per family."""

EQUAL_TIME = 0.02
"""Families whose times differ by less are equal: then the device's first shape and the cheapest predictor."""


@dataclass(frozen=True)
class Family:
    """Calls of all sites at any threshold.

    Attributes:
        calls: by site, with the policy, the block shape and what is kept; their taus mean nothing.
    """

    calls: Mapping[str, SparseCall]

    def at(self, threshold: float) -> dict[str, SparseCall]:
        """The calls at one threshold: the strength that a block must exceed; 0 keeps everything."""
        tau = round(1 / (1 + threshold), DECIMALS)
        return {name: call.with_tau(torch.full((call.heads,), tau)) for name, call in self.calls.items()}


def fastest_family(
    runs: Sequence[SampleRun], settings: TuneSettings, stopwatch: Stopwatch, progress: Callable[[], None]
) -> Family:
    """The policy and block shape that make a graph's sites fastest at an equal error.

    Args:
        runs: samples; the first one is explored.
        settings: block shapes to compare; stopwatch: what is timed; progress: called after each site.
    """
    names = [site.name for site in runs[0].sites]
    explored = set(names[:: -(-len(names) // EXPLORED_SITES)])
    policies = [policy.name for policy in POLICIES.values() if policy.explored and policy.rule == "share"]
    times: dict[tuple[BlockShape, str], float] = defaultdict(float)
    plain: dict[str, SparseCall] = {}
    with closing(capture(runs[:1])) as walk:
        for name, operands in walk:
            inputs = SiteInputs(operands)
            plain[name] = SparseCall.uniform(inputs.heads, 0.0, kept=inputs.kept)
            for shape in settings.shapes_on(operands[0].device) if name in explored else ():
                for policy in policies:
                    call = _of_family(plain[name], policy, shape)
                    times[shape, policy] += _milliseconds(inputs, call, stopwatch)
            progress()
    fastest = min(times.values())
    shape, policy = next(key for key, ms in times.items() if ms <= (1 + EQUAL_TIME) * fastest)
    return Family({name: _of_family(call, policy, shape) for name, call in plain.items()})


def _of_family(call: SparseCall, policy: str, shape: BlockShape) -> SparseCall:
    return SparseCall.uniform(call.heads, 0.0, policy=policy, shape=shape, kept=call.kept)


def _milliseconds(inputs: SiteInputs, call: SparseCall, stopwatch: Stopwatch) -> float:
    """What a site would take with a family at :data:`EQUAL_ERROR`; nothing where there is nothing to skip."""
    element = inputs.explored
    if nothing_to_skip([element], call.kept, [call.shape]) is not None:
        return 0.0
    points = measured_at_crossing(inputs, call, EQUAL_ERROR)
    at_crossing = call.with_tau(points.tau)
    timed = call if at_crossing.is_dense else at_crossing
    live = float((1 - points.sparsity).mean())
    return live * stopwatch.attention_ms(element, timed) + stopwatch.predictor_ms(element, timed)
