"""The calibrated artefact: what was decided for every site and head, under which conditions, as JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from afbs_compile.errors import RecipeError
from afbs_compile.kernels.fp8 import constant_count
from afbs_compile.kernels.reference import Kept

FORMAT = "afbs-recipe"
SCHEMA_VERSION = 3

Stage = Literal["explore", "refine", "validate"]
Precision = Literal["own", "fp8"]
Policy = Literal["meansim", "meanshare", "cumulant", "antidiagonal", "vertical_slash", "sink_window"]


@dataclass(frozen=True)
class SearchPath:
    """Thresholds that one stage of the search measured on a head, in the order in which it tried them.

    Attributes:
        stage: ``"explore"``, ``"refine"`` or ``"validate"``; length: tokens it was measured at.
        policy, block_q, block_k: as in :class:`HeadRecipe` and :class:`SiteRecipe`.
        s: the latent of Eq. 2 where the method searches over it, else empty.
        tau, theta, lam: what was tried; sparsity: what it skipped; error: relative L1, worst of the inputs, infinite
            or NaN ones as -1. All of the same length.
    """

    stage: Stage
    length: int
    policy: str
    block_q: int
    block_k: int
    s: tuple[float, ...]
    tau: tuple[float, ...]
    theta: tuple[float, ...]
    lam: tuple[float, ...]
    sparsity: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class HeadRecipe:
    """One head.

    Attributes:
        outcome: ``"dense"`` heads keep every block.
        policy: what scores the key blocks, by name (:mod:`afbs_compile.kernels.policies`): ``"meansim"``, say, the
            softmax of block means (SpargeAttn).
        tau: pooled-softmax mass kept; theta: self-similarity below which a block is always kept (negative: off);
            lam: skip threshold in log2 units (-1000: off, as every method but ``"paper"`` leaves it).
        sparsity: 1 - live / causally valid blocks, mean of the samples.
        error: relative L1 (Eq. 1), worst of ``validation_errors``.
        validation_errors: one per validation input.
        search: how the thresholds were found; empty where that was not recorded.
        tau_exponent, length_exponent: a and b of ``error ~ (1 - tau) ** a * length ** b`` about the operating point;
            both 0 where they were not measured.
        precision: what a sparse head computes in: ``"own"``, that of its operands, or ``"fp8"``, whose rounding is part
            of ``error``.
        precision_reason: why a sparse head is not in FP8 where that was asked for.
    """

    outcome: Literal["sparse", "dense"]
    policy: Policy
    tau: float
    theta: float
    lam: float
    sparsity: float
    error: float
    validation_errors: tuple[float, ...]
    search: tuple[SearchPath, ...] = ()
    tau_exponent: float = 0.0
    length_exponent: float = 0.0
    precision: Precision = "own"
    precision_reason: str | None = None


@dataclass(frozen=True)
class SiteRecipe:
    """One attention call.

    Attributes:
        name: where it stands in the model, e.g. ``model.layers.3.self_attn``.
        outcome: ``"sparse"`` calls are rewritten; ``"dense"`` ones were calibrated and stay as they are;
            ``"refused"`` ones could not be rewritten.
        reason: why a call is not sparse; ``None`` for sparse ones.
        causal, head_dim, kv_heads: of the call; dtype: of q, k and v, e.g. ``"bfloat16"``; ``None`` for refused ones.
        block_q, block_k: rows per block of queries and of keys; ``None`` for refused calls.
        heads: one entry per query head; empty for refused calls.
        dense_ms, sparse_ms: milliseconds at the calibrated length; ``None`` where not measured.
        min_length: shortest length at which sparse is worthwhile; shorter inputs run dense.
        validated_lengths: shortest and longest length at which the thresholds were validated.
        kernel: what computed the sparse call when it was timed, e.g. ``"hopper 128x128"``; ``None`` where every head is
            DENSE. kernel_reason: why not the quickest kernel of the engine.
        last_rows: query blocks that hold one of this many last rows of a causal call keep every block.
        local_keys: the blocks that hold one of this many keys right before a query block of it are kept too.
        fp8_constants: what the samples say about keys and values, for the heads of precision ``"fp8"``: for each key
            head its D means and its two peaks; empty where there is no such head.
    """

    name: str
    outcome: Literal["sparse", "dense", "refused"]
    reason: str | None = None
    causal: bool | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    dtype: str | None = None
    block_q: int | None = None
    block_k: int | None = None
    heads: tuple[HeadRecipe, ...] = ()
    dense_ms: float | None = None
    sparse_ms: float | None = None
    min_length: int | None = None
    validated_lengths: tuple[int, int] | None = None
    kernel: str | None = None
    kernel_reason: str | None = None
    last_rows: int = 0
    local_keys: int = 0
    fp8_constants: tuple[float, ...] = ()

    @property
    def kept(self) -> Kept:
        """``local_keys`` and ``last_rows``."""
        return Kept(self.last_rows, self.local_keys)

    @property
    def sparsity(self) -> float:
        """Mean over the heads of what runs: 0 unless the call is rewritten."""
        return sum(head.sparsity for head in self.heads) / len(self.heads) if self.outcome == "sparse" else 0.0

    @property
    def error(self) -> float:
        """Largest error of any head of what runs: 0 unless the call is rewritten."""
        return max(head.error for head in self.heads) if self.outcome == "sparse" else 0.0


@dataclass(frozen=True)
class SampleRecord:
    """What the thresholds were calibrated on.

    Attributes:
        source: ``"samples"`` given by the user or ``"first call"``.
        count: samples.
        validation_inputs: inputs that every sparse head was validated on: the samples' batch elements or, where
            there is only one, its disjoint windows of queries.
        lengths: tokens of the shortest and the longest sample at the attention calls.
        digest: SHA-256 of the graph inputs of all samples.
    """

    source: Literal["samples", "first call"]
    count: int
    validation_inputs: int
    lengths: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class Promise:
    """An upper bound, at a confidence, on the chance that a new input exceeds the tolerance.

    It holds for inputs exchangeable with those it was derived from, over the draw of the latter;
    :mod:`afbs_compile.tuner.promise` says why.

    Attributes:
        confidence: of either bound.
        inputs: n, those that had no say in theta, policy and block shape; 0 promises nothing.
        head_bound: chance that a given head exceeds the tolerance on a new input.
        deciding: those of the n inputs that kept any head from a bolder threshold.
        model_bound: chance that any head of the graph does.
    """

    confidence: float
    inputs: int
    head_bound: float
    deciding: int
    model_bound: float


@dataclass(frozen=True)
class BudgetRecord:
    """A budget on the model's output, and what the chosen thresholds were measured to cost of it.

    Attributes:
        quantity: ``"kl"``: mean KL(dense || sparse) of the next-token distributions, in nats; ``"perplexity"``: its
            relative rise.
        limit: largest accepted value.
        measured: cost on the samples that the thresholds were chosen on; chosen_on: how many these are.
        checked: cost on samples that were not used to choose, ``None`` where there were none; checked_on: how many.
        steps_back: times that the check failed and the thresholds were chosen more carefully.
        forward_passes: of the model on one sample, all that it took.
    """

    quantity: Literal["kl", "perplexity"]
    limit: float
    measured: float
    chosen_on: int
    checked: float | None
    checked_on: int
    steps_back: int
    forward_passes: int


@dataclass(frozen=True)
class GraphRecipe:
    """One graph of the model: a model with graph breaks has several.

    Attributes:
        graph: fingerprint of its attention calls and tensor shapes; weights: fingerprint of parameter and buffer
            values; source: fingerprint of the code that makes the calls, to tell apart graphs that are alike otherwise.
        samples: what it was calibrated on.
        seconds: wall-clock time of the calibration.
        evaluations: its attention work in dense calls over one input of full length, summed over the sites.
        sites: in graph order.
        promise: what the validation says about inputs that were not seen; ``None`` where nothing was calibrated.
    """

    graph: str
    weights: str
    source: str
    samples: SampleRecord
    seconds: float
    evaluations: float
    sites: tuple[SiteRecipe, ...]
    promise: Promise | None = None


_NOT_IN_RECORDS = {"name", "outcome", "reason", "heads", "fp8_constants"}
"""Fields of a site that :meth:`Recipe.to_records` writes under another name, one head at a time, or not at all."""

_ADDED = {"precision", "precision_reason", "fp8_constants", "last_rows", "local_keys"}
"""Fields that recipes of this schema lack where they are older; they then have their defaults."""


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rewrite a model again without calibrating, and to know when that would be wrong.

    Thresholds hold for one policy, block shape, dtype and predictor; a recipe that does not fit is refused, never bent.

    Attributes:
        tolerance: largest relative L1 error per head and validation input; ``None`` where a budget was given instead.
        method, parameterization: how the thresholds were searched.
        device: device type the speeds were measured on; engine: kernel that ran there.
        predictor_version: version of the selection rule.
        versions: of afbs_compile, torch, triton and python.
        graphs: one per captured graph that has attention calls.
        budget: of the model's output, where that was given instead of a tolerance.
    """

    tolerance: float | None
    method: Literal["afbs", "paper"]
    parameterization: Literal["corrected", "paper"]
    device: str
    engine: str
    predictor_version: int
    versions: dict[str, str]
    graphs: tuple[GraphRecipe, ...]
    budget: BudgetRecord | None = None
    format: str = field(default=FORMAT)
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def goal(self) -> str:
        """What the thresholds had to hold, in words."""
        if self.budget is not None:
            what = {"kl": "KL at most {:g} nats", "perplexity": "perplexity at most {:+.3g} %"}[self.budget.quantity]
            unit = 100 if self.budget.quantity == "perplexity" else 1
            return f"budget on the output: {what.format(self.budget.limit * unit)}"
        return f"tolerance {self.tolerance:g} on every head"

    @property
    def sites(self) -> tuple[SiteRecipe, ...]:
        """The attention calls of all graphs."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def sparsity(self) -> float:
        """Mean sparsity over the heads of all calls that were calibrated, rewritten or not."""
        calibrated = [(site.sparsity, len(site.heads)) for site in self.sites if site.heads]
        heads = sum(count for _, count in calibrated)
        return sum(sparsity * count for sparsity, count in calibrated) / heads if heads else 0.0

    def to_records(self) -> list[dict[str, Any]]:
        """One flat dictionary per head, e.g. for ``pandas.DataFrame(recipe.to_records())``.

        Each has the fields of :class:`HeadRecipe` but ``search``, of its :class:`SiteRecipe` but ``fp8_constants`` (its
        ``name`` as ``site``, its ``outcome`` and ``reason`` as ``site_outcome`` and ``site_reason``), and the numbers
        ``graph`` and ``head``. Calls that were refused have no heads; ``explain(recipe).to_records()`` has a row for
        every call.
        """
        return [
            {
                "graph": number,
                "site": site.name,
                "head": index,
                **{f.name: getattr(head, f.name) for f in fields(head) if f.name != "search"},
                "site_outcome": site.outcome,
                "site_reason": site.reason,
                **{f.name: getattr(site, f.name) for f in fields(site) if f.name not in _NOT_IN_RECORDS},
            }
            for number, graph in enumerate(self.graphs)
            for site in graph.sites
            for index, head in enumerate(site.heads)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON; the file appears whole or not at all.

        Raises:
            OSError: the folder is missing or not writable.
        """
        target = Path(path)
        text = json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: the file is missing, damaged, not a recipe, or of another schema version; one sentence.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"recipe {path} is damaged: it is not JSON ({error}).") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RecipeError(f"recipe {path} is not an afbs recipe: its 'format' is not {FORMAT!r}.")
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            age = "newer than" if isinstance(version, int) and version > SCHEMA_VERSION else "not"
            raise RecipeError(f"recipe {path} has schema version {version!r}, {age} the {SCHEMA_VERSION} read here.")
        try:
            recipe: Recipe = _decode(cls, data, "recipe")
            _check(recipe)
        except _DamagedError as error:
            raise RecipeError(f"recipe {path} is damaged: {error}.") from error
        return recipe


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _DamagedError(Exception):
    """What is wrong with a decoded value, without the file's name."""


def _check(recipe: Recipe) -> None:
    """Refuse values that no calibration writes."""
    if (recipe.tolerance is None) == (recipe.budget is None):
        raise _DamagedError("it needs either a tolerance or a budget")
    if recipe.tolerance is not None and not 0 < recipe.tolerance < math.inf:
        raise _DamagedError(f"tolerance is {recipe.tolerance}")
    if not recipe.graphs:
        raise _DamagedError("it has no graph")
    for site in recipe.sites:
        if site.outcome != "refused" and not (site.heads and site.block_q and site.block_k):
            raise _DamagedError(f"{site.name} is {site.outcome} and has no heads, or no block shape")
        fp8 = any(head.precision == "fp8" for head in site.heads)
        if fp8 and len(site.fp8_constants) != constant_count(site.kv_heads or 0, site.head_dim or 0):
            raise _DamagedError(f"{site.name} has heads in FP8 and not the constants of its key heads")
        for name, value in site.kept._asdict().items():
            if value < 0:
                raise _DamagedError(f"{site.name} has {name} {value}")
        if not all(map(math.isfinite, site.fp8_constants)):
            raise _DamagedError(f"{site.name} has an FP8 constant that is not finite")
        for index, head in enumerate(site.heads):
            numbers = [head.tau, head.theta, head.lam, head.sparsity, head.error, *head.validation_errors]
            if not all(math.isfinite(number) for number in numbers):
                raise _DamagedError(f"head {index} of {site.name} has a number that is not finite")
            if head.tau < 0 or not 0 <= head.sparsity <= 1 or head.lam > 0:
                raise _DamagedError(f"head {index} of {site.name} has tau, sparsity or lam out of range")
            for path in head.search:
                columns = {
                    len(c) for c in (path.tau, path.theta, path.lam, path.sparsity, path.error, path.s or path.tau)
                }
                if len(columns) != 1:
                    raise _DamagedError(f"head {index} of {site.name} has a search path whose columns differ in length")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Rebuild a value of the annotated type from JSON, refusing anything that does not fit it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (Union, types.UnionType):
        inner = next(option for option in arguments if option is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _DamagedError(f"{where} is {value!r}, not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise _DamagedError(f"{where} is not a list of the expected length")
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _DamagedError(f"{where} is not an object")
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _DamagedError(f"{where} is {value!r}, not {kind.__name__}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    names = {f.name for f in fields(kind)}
    if not isinstance(value, Mapping):
        raise _DamagedError(f"{where} is not an object")
    names -= _ADDED - set(value)
    if wrong := names ^ set(value):
        raise _DamagedError(f"{where} lacks or has too much: {', '.join(sorted(wrong))}")
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})
