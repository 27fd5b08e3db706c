"""The families of operating points that one threshold moves along: a policy and a block shape that all sites share.

A threshold means the same everywhere only where scores and blocks are made alike. So they are chosen once for a graph.
An equal error of its heads costs the model's output more with one policy than with another: the error leaves a few
contenders, one for each policy, and which of them is fastest at an equal cost is asked of the output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from afbs_compile.kernels.attend.engines import engine_of
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.tuner.curves import SMALLEST
from afbs_compile.tuner.explore import explored_curve, tau_grid
from afbs_compile.tuner.inputs import SiteInputs
from afbs_compile.tuner.kept import KeptChoice, choose_kept
from afbs_compile.tuner.measure import nothing_to_skip
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.speed import Stopwatch
from afbs_compile.tuner.threshold import START
from afbs_compile.tuner.validate import DECIMALS

EQUAL_ERROR = 0.1
"""Relative L1 of each head at which families are compared: about what +1 % of perplexity does to them."""

EXPLORED_SITES = 4
"""Sites that are explored, spread over the graph: their kinds differ little, and each costs a pass per family."""

EQUAL_TIME = 0.02
"""Families whose times differ by less are equal: then the device's first shape and the cheapest predictor."""

MOST = 3
"""Contenders: each costs some passes."""

BEHIND = 1.5
"""A family that takes this many times the fastest one's time at an equal error is no contender."""


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


@dataclass(frozen=True)
class SiteTimes:
    """What was measured of a family at one site.

    Attributes:
        sparsity: ``[P]``, mean over the heads, at the taus that exploration tries.
        attention_ms: with every block live; predictor_ms: of the predictor.
        at_equal_error: share of the blocks that is live where the heads have :data:`EQUAL_ERROR`.
    """

    sparsity: Tensor
    attention_ms: float
    predictor_ms: float
    at_equal_error: float

    def ms(self, live: float) -> float:
        """Of a share of live blocks."""
        return live * self.attention_ms + self.predictor_ms


@dataclass(frozen=True)
class Contender:
    """A family, and what the explored sites take with it.

    Attributes:
        family: the calls; sites: what was measured, empty where there is nothing to skip.
    """

    family: Family
    sites: tuple[SiteTimes, ...]

    def ms_at_equal_error(self) -> float:
        """Of the explored sites together."""
        return sum(site.ms(site.at_equal_error) for site in self.sites)

    def ms(self, threshold: float) -> float:
        """Of the explored sites together at a threshold."""
        tried = -np.log1p(-tau_grid().numpy())  # ascending, evenly spaced
        at = -math.log(max(threshold / (1 + threshold), SMALLEST))
        return sum(site.ms(1 - float(np.interp(at, tried, site.sparsity.numpy()))) for site in self.sites)


def contenders(
    runs: Sequence[SampleRun], settings: TuneSettings, stopwatch: Stopwatch, progress: Callable[[], None]
) -> tuple[list[Contender], dict[str, KeptChoice]]:
    """Of each policy its fastest block shape at an equal error, and what each site always keeps.

    Args:
        runs: samples; the first one is explored.
        settings: block shapes to compare; stopwatch: what is timed; progress: called after each site.

    Returns:
        The fastest policy first, slow ones left out; by site.
    """
    names = [site.name for site in runs[0].sites]
    groups = {site.shapes().operands().groups for site in runs[0].sites}
    explored = set(names[:: -(-len(names) // EXPLORED_SITES)])
    policies = [policy.name for policy in POLICIES.values() if policy.explored and policy.rule == "share"]
    found: dict[tuple[str, BlockShape], list[SiteTimes]] = defaultdict(list)
    plain: dict[str, SparseCall] = {}
    kept: dict[str, KeptChoice] = {}
    shapes: list[BlockShape] = []
    with closing(capture(runs[:1])) as walk:
        for name, operands in walk:
            inputs = SiteInputs(operands)
            if not shapes:  # the same at all sites, or their times could not be added up
                shapes = [s for s in settings.shapes_on(operands[0].device) if _serves(s, inputs.explored, groups)]
            kept[name] = choose_kept(inputs.explored, inputs.kept, shapes[0], START)
            plain[name] = SparseCall.uniform(inputs.heads, 0.0, kept=kept[name].kept)
            for shape in shapes if name in explored else ():
                for policy in policies:
                    found[policy, shape] += _times_of(inputs, _of_family(plain[name], policy, shape), stopwatch)
            progress()

    def contender(policy: str, shape: BlockShape) -> Contender:
        calls = {name: _of_family(call, policy, shape) for name, call in plain.items()}
        return Contender(Family(calls), tuple(found[policy, shape]))

    best = []
    for policy in policies:
        shaped = [contender(policy, shape) for of, shape in found if of == policy]
        best.append(shaped[fastest([each.ms_at_equal_error() for each in shaped])])
    ordered = sorted(best, key=Contender.ms_at_equal_error)
    least = ordered[0].ms_at_equal_error()
    close = [each for each in ordered if each.ms_at_equal_error() <= BEHIND * least]
    return close[: MOST if least else 1], kept


def _serves(shape: BlockShape, sample: Operands, groups: set[int]) -> bool:
    """Whether a shape is worth a look: heads that share a selection are for an engine that computes them together.

    Args:
        groups: how many query heads share a key head, at all sites.
    """
    if shape.heads == 1:
        return True
    if any(number % shape.heads for number in groups):
        return False
    engine, _ = engine_of(sample, SparseCall.uniform(sample.heads, 0.5, shape=shape))
    return shape in engine.shapes


def fastest(times: Sequence[float]) -> int:
    """Place of the first time that is about the least."""
    return next(place for place, ms in enumerate(times) if ms <= (1 + EQUAL_TIME) * min(times))


def _of_family(call: SparseCall, policy: str, shape: BlockShape) -> SparseCall:
    return SparseCall.uniform(call.heads, 0.0, policy=policy, shape=shape, kept=call.kept)


def _times_of(inputs: SiteInputs, call: SparseCall, stopwatch: Stopwatch) -> list[SiteTimes]:
    """What a site would take with a family; nothing where there is nothing to skip."""
    element = inputs.explored
    if nothing_to_skip([element], call.kept, [call.shape]) is not None:
        return []
    curve = explored_curve(inputs, call, EQUAL_ERROR)
    at_crossing = call.with_tau(curve.crossing.tau[0])
    timed = call if at_crossing.is_dense else at_crossing
    attention, predictor = stopwatch.attention_ms(element, timed), stopwatch.predictor_ms(element, timed)
    return [SiteTimes(curve.sparsity.mean(0), attention, predictor, float((1 - curve.crossing.sparsity).mean()))]
