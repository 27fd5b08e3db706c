"""Table I's methods behind one interface: what is kept, by one knob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paper_parts import by_policy, dynamic, fixed
from paper_parts.head import Keep
from paper_parts.setting import Setting


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as the tables have it; source: who describes it; note: where our reading of it was a choice.
        keep: what a head keeps, for those that are simulated; calls: the constants of a call, for those that run as
            kernels. One of the two.
        recommended: settings of the knob that its authors recommend, by what they call them.
    """

    name: str
    source: str
    note: str
    keep: Keep | None = None
    calls: Callable[[Setting], by_policy.Calls] | None = None
    recommended: tuple[tuple[str, float], ...] = ()

    @property
    def runs(self) -> bool:
        """Whether it runs as a block-sparse kernel; the others are simulated by masks."""
        return self.calls is not None


def _shared(policy: str, theta: float = -1.0) -> Callable[[Setting], by_policy.Calls]:
    return lambda _: by_policy.one_threshold(policy, theta=theta)


METHODS: tuple[Method, ...] = (
    Method("dense", "", "", keep=fixed.everything),
    Method("window", "", "", keep=fixed.window),
    Method("Longformer", "Beltagy et al. 2020", "the first 64 tokens are the global ones", keep=fixed.longformer),
    Method("Sparse Transformer", "Child et al. 2019", "strided, both kinds of head in one", keep=fixed.strided),
    Method(
        "Reformer",
        "Kitaev et al. 2020",
        "4 rounds; queries and keys are sorted each; by the whole text",
        keep=dynamic.reformer,
    ),
    Method(
        "Routing Transformer",
        "Roy et al. 2021",
        "k-means anew for each text, of all of it",
        keep=dynamic.routing,
    ),
    Method("StreamingLLM", "Xiao et al. 2023", "4 sinks", keep=fixed.streaming),
    Method("H2O, as a mask", "Zhang et al. 2023", "half recent; dense attention's weights", keep=dynamic.heavy_hitters),
    Method("H2O, evicting", "Zhang et al. 2023", "64 rows at a time", keep=dynamic.eviction),
    Method("sink + random", "", "4 sinks, random keys", keep=fixed.sink_and_random),
    Method("random blocks", "", "and a row's own", keep=fixed.random_blocks),
    Method("top-k tokens, oracle", "", "", keep=dynamic.top_tokens),
    Method("top-k blocks, oracle", "", "mean weight of a block's rows", keep=dynamic.top_blocks),
    Method(
        "SpargeAttn, topk",
        "Zhang et al. 2025",
        "its interface without thresholds: the blocks of largest pooled scores",
        keep=dynamic.pooled_blocks,
        recommended=(("topk 0.5", 0.5),),
    ),
    Method(
        "SpargeAttn",
        "Zhang et al. 2025",
        "theta 0.6 at every tau, which bounds its sparsity; lambda off",
        calls=_shared("meansim", by_policy.THETA),
        recommended=(("tau 0.9, theta 0.6", 0.1), ("tau 0.98, theta 0.6", 0.02)),
    ),
    Method(
        "XAttention",
        "Xu et al. 2025",
        "stride 16",
        calls=_shared("antidiagonal"),
        recommended=(("threshold 0.9", 0.1),),
    ),
    Method(
        "FlexPrefill",
        "Lai et al. 2025",
        "pattern chosen for each input",
        calls=lambda _: by_policy.flex_prefill,
        recommended=(("gamma 0.95", 0.05), ("gamma 0.9", 0.1)),
    ),
    Method(
        "MInference",
        "Jiang et al. 2024",
        "columns and diagonals for every head, by mass instead of counts made for 128K tokens",
        calls=_shared("vertical_slash"),
    ),
    Method("AnchorAttention", "2025", "stripes for 64 rows", keep=dynamic.anchor, recommended=(("theta 12", 0.5),)),
    Method(
        "AFBS-BO as printed",
        "the paper",
        "thresholds of Algorithm 1 moved together, theta to 0",
        calls=lambda setting: by_policy.of_recipe(setting.recipe(method="paper", tolerance=setting.TOLERANCE)),
        recommended=(("Algorithm 1", 0.5),),
    ),
    Method(
        "ours, tolerance",
        "",
        "thresholds of tolerance 0.055 moved together",
        calls=lambda setting: by_policy.of_recipe(setting.recipe(tolerance=setting.TOLERANCE)),
        recommended=(("0.055 on every head", 0.5),),
    ),
    Method(
        "ours, budget",
        "",
        "one threshold for all heads, moved",
        calls=lambda setting: by_policy.of_recipe(setting.recipe(budget=("kl", 0.01))),
        recommended=(("KL 0.01, the default", 0.5),),
    ),
    Method(
        "ours, budget of +1 %",
        "",
        "one threshold for all heads, moved",
        calls=lambda setting: by_policy.of_recipe(setting.recipe(budget=("perplexity", 0.01))),
        recommended=(("perplexity +1 %", 0.5),),
    ),
    Method(
        "ours, nothing always kept",
        "",
        "policy cumulant, one threshold, without the local keys and last rows that calibration keeps",
        calls=_shared("cumulant"),
    ),
)
