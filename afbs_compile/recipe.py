"""The calibrated artefact: what was decided for every site and head, under which conditions, as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from afbs_compile.card import card
from afbs_compile.codec import DamagedError, Range, decode, parsed
from afbs_compile.errors import RecipeError, cut, shown
from afbs_compile.files import read_regular, write_whole
from afbs_compile.hub import downloaded, uploaded
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import BLOCK_HEADS, BLOCKS, KEEP_ALL, LONGEST, SparseCall, fp8_constant_count
from afbs_compile.kernels.masks.registry import mask_of
from afbs_compile.kernels.operands import DTYPES
from afbs_compile.recipe_schema3 import VERSION as EARLIER_SCHEMA
from afbs_compile.recipe_schema3 import upgraded
from afbs_compile.sketch import TensorSketch

FORMAT = "afbs-recipe"

HUB_FILE = "afbs_recipe.json"
"""A recipe in a folder or repository of others."""

SCHEMA_VERSION = 6

ALIKE_SCHEMAS = (4, 5)
"""Their files lack what heads share of a selection and what local keys were chosen from, those of 4 the sketches of
weights, and are alike in all else."""

LARGEST = 256 * 2**20
"""Bytes of a file: one head takes about 14 KB, those of a model of 405 billion parameters 220 MB."""

DIGEST = "sha256"
"""Key of a file's own digest, which entries of the cache have; a file that has one must agree with it."""

LARGEST_EXPONENT = 2.0
"""Of a length: fits beyond this are noise, an error that grows with the square of the length has never been seen."""

LARGEST_TAU_EXPONENT = 4.0
"""Likewise, of ``1 - tau``."""

Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0)]
Count = Annotated[int, Range(0, 2**63 - 1)]
Size = Annotated[int, Range(1, LONGEST)]
Length = Annotated[int, Range(0, LONGEST)]

Method = Literal["afbs", "paper"]
METHODS: tuple[str, ...] = get_args(Method)

DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)

Stage = Literal["explore", "refine", "validate"]


@dataclass(frozen=True)
class SearchPath:
    """Thresholds that one stage of the search measured on a head, in the order in which it tried them.

    Attributes:
        stage: ``"explore"``, ``"refine"`` or ``"validate"``; length: tokens it was measured at.
        policy, shape: as in :class:`afbs_compile.kernels.call.SparseCall`.
        s: the latent of Eq. 2 where the method searches over it, else empty.
        tau, theta, lam: what was tried; sparsity: what it skipped; error: relative L1, worst of the inputs, infinite
            or NaN ones as -1. All of the same length.
    """

    stage: Stage
    length: Length
    policy: str
    shape: BlockShape
    s: tuple[float, ...]
    tau: tuple[Share, ...]
    theta: tuple[Annotated[float, Range(high=1)], ...]
    lam: tuple[Annotated[float, Range(high=0)], ...]
    sparsity: tuple[Share, ...]
    error: tuple[Annotated[float, Range(-1)], ...]


@dataclass(frozen=True)
class HeadRecipe:
    """What was measured of one head; its constants are in the call's :class:`~afbs_compile.kernels.call.SparseCall`.

    Attributes:
        outcome: ``"dense"`` heads keep every block.
        sparsity: 1 - live / visible blocks, mean of the samples.
        error: relative L1 (Eq. 1), worst of ``validation_errors``; rounding to FP8 is part of it.
        validation_errors: one per validation input.
        search: how the thresholds were found; empty where that was not recorded.
        tau_exponent, length_exponent: a and b of ``error ~ (1 - tau) ** a * length ** b`` about the operating point;
            both 0 where they were not measured.
        precision_reason: why a sparse head is not in FP8 where that was asked for.
    """

    outcome: Literal["sparse", "dense"]
    sparsity: Share
    error: Amount
    validation_errors: tuple[Amount, ...]
    search: tuple[SearchPath, ...] = ()
    tau_exponent: Annotated[float, Range(0, LARGEST_TAU_EXPONENT)] = 0.0
    length_exponent: Annotated[float, Range(-LARGEST_EXPONENT, LARGEST_EXPONENT)] = 0.0
    precision_reason: str | None = None


@dataclass(frozen=True)
class KeptTrial:
    """What always keeping the blocks before each query block was measured to buy at a site, at one threshold.

    Attributes:
        local_keys: as in :class:`afbs_compile.kernels.call.Kept`.
        live: share of the visible blocks that is live, mean of the heads.
        error: root mean square over rows and heads of ``|o - o_dense| / |o_dense|``; worst_row: the largest of them,
            where no last rows are whole.
    """

    local_keys: Length
    live: Share
    error: Amount
    worst_row: Amount


@dataclass(frozen=True)
class SiteRecipe:
    """One attention call.

    Attributes:
        name: where it stands in the model, e.g. ``model.layers.3.self_attn``.
        outcome: ``"sparse"`` calls are rewritten; ``"dense"`` ones were calibrated and stay as they are;
            ``"refused"`` ones could not be rewritten.
        reason: why a call is not sparse; ``None`` for sparse ones.
        mask: what its rows see, as the text of a mask, e.g. ``"causal"``; head_dim, kv_heads: of the call; dtype: of q,
            k and v, e.g. ``"bfloat16"``; ``None`` for refused ones.
        call: its constants, whether it is rewritten or not; ``min_length`` is the shortest length at which sparse was
            measured to be worthwhile, 0 where none was. ``None`` for refused ones.
        heads: what was measured, one entry per query head; empty for refused calls.
        dense_ms, sparse_ms: milliseconds at the calibrated length; ``None`` where not measured.
        validated_lengths: shortest and longest length at which the thresholds were validated.
        kernel: what computed the sparse call when it was timed, e.g. ``"hopper 128x128"``; ``None`` where every head is
            DENSE. kernel_reason: why not a quicker one.
        unsure: whether the machine had other work while the call was timed, and the times are too close to tell which
            is the shorter one without it: it is timed again when the machine has none.
        kept_tried: what the local keys of the call were chosen from; empty where they were not measured.
    """

    name: str
    outcome: Literal["sparse", "dense", "refused"]
    reason: str | None = None
    mask: str | None = None
    head_dim: Size | None = None
    kv_heads: Size | None = None
    dtype: str | None = None
    call: SparseCall | None = None
    heads: tuple[HeadRecipe, ...] = ()
    dense_ms: Amount | None = None
    sparse_ms: Amount | None = None
    validated_lengths: tuple[Size, Size] | None = None
    kernel: str | None = None
    kernel_reason: str | None = None
    unsure: bool = False
    kept_tried: tuple[KeptTrial, ...] = ()

    @property
    def calibrated(self) -> SparseCall:
        """The call's constants.

        Raises:
            ValueError: it was refused, so it has none.
        """
        if self.call is None:
            raise ValueError(f"{self.name} was refused: it has no constants")
        return self.call

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
    count: Count
    validation_inputs: Count
    lengths: tuple[Length, Length]
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

    confidence: Share
    inputs: Count
    head_bound: Share
    deciding: Count
    model_bound: Share


@dataclass(frozen=True)
class BudgetRecord:
    """A budget on the model's output, and what the chosen thresholds were measured to cost of it.

    Attributes:
        quantity: ``"kl"``: mean KL(dense || sparse) of the next-token distributions, in nats; ``"perplexity"``: its
            relative rise; ``"output"``: relative L1 error of the output.
        limit: largest accepted value.
        measured: cost on the samples that the threshold was chosen on; chosen_on: how many these are.
        checked: cost on samples that were not used to choose, ``None`` where there were none; checked_on: how many.
        steps_back: times that the check failed and the threshold was made more careful.
        forward_passes: of the model on one sample, all that it took.
        checked_upper: upper end of the 95 % confidence interval of ``checked``, ``None`` where there is none.
        unit: what is counted, ``"samples"`` or, where one sample chose and checked, ``"windows"`` of its tokens.
        threshold: strength that a block must exceed, in every head; 0 in recipes with thresholds of their own.
    """

    quantity: Literal["kl", "perplexity", "output"]
    limit: Annotated[float, Range(0, 1, inside=True)]
    measured: float
    chosen_on: Count
    checked: float | None
    checked_on: Count
    steps_back: Count
    forward_passes: Count
    checked_upper: float | None = None
    unit: Literal["samples", "windows"] = "samples"
    threshold: Amount = 0.0

    def amount(self, value: float, most: str = "") -> str:
        """A value of the quantity in words, e.g. ``"perplexity at most +1 %"``."""
        words = {"kl": "KL {}{:.3g} nats", "perplexity": "perplexity {}{:+.3g} %", "output": "error {}{:.3g}"}
        return words[self.quantity].format(most, value * 100 if self.quantity == "perplexity" else value)

    @property
    def is_confirmed(self) -> bool:
        """Whether the upper end of what was checked is inside the limit."""
        return self.checked_upper is not None and self.checked_upper <= self.limit


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
        tensors: what tells its parameters and buffers in other forms; empty in recipes of an earlier schema.
    """

    graph: str
    weights: str
    source: str
    samples: SampleRecord
    seconds: Amount
    evaluations: Amount
    sites: tuple[SiteRecipe, ...]
    promise: Promise | None = None
    tensors: tuple[TensorSketch, ...] = ()


@dataclass(frozen=True)
class Change:
    """One calibration of a model whose recipe was found not to hold any more.

    Attributes:
        when: ISO 8601, UTC; reason: what the monitor had found, or that it was asked for; heads: those that it had
            named.
    """

    when: str
    reason: str
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rewrite a model again without calibrating, and to know when that would be wrong.

    Thresholds hold for one policy, block shape, dtype and predictor; a recipe that does not fit is refused, never bent.

    Attributes:
        options: what the user asked of calibration, by the names of :mod:`afbs_compile.options`.
        device: device type the speeds were measured on; engine: family of the kernels that ran there.
        predictor_version: version of the selection rule.
        versions: of afbs_compile, torch, triton and python.
        graphs: one per captured graph that has attention calls.
        budget: of the model's output, where that was given instead of a tolerance.
        history: what led from the first recipe to this one, where a monitor had a model calibrated again.
    """

    options: dict[str, Any]
    device: str
    engine: str
    predictor_version: Count
    versions: dict[str, str]
    graphs: tuple[GraphRecipe, ...]
    budget: BudgetRecord | None = None
    history: tuple[Change, ...] = ()
    format: str = field(default=FORMAT)
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def tolerance(self) -> float | None:
        """Largest relative L1 error per head and validation input; ``None`` where a budget was given instead."""
        tolerance = self.options.get("tolerance")
        return None if isinstance(tolerance, Mapping) or tolerance is None else float(tolerance)

    @property
    def method(self) -> str:
        """How the thresholds were searched."""
        return str(self.options.get("method"))

    @property
    def goal(self) -> str:
        """What the thresholds had to hold, in words."""
        if self.budget is not None:
            return f"budget on the output: {self.budget.amount(self.budget.limit, 'at most ')}"
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

        Each has the constants of the head, ``tau, theta, lam, policy, precision``, the fields of :class:`HeadRecipe`
        but ``search``, those of its :class:`SiteRecipe` and of the call that are one for all heads (its ``name`` as
        ``site``, its ``outcome`` and ``reason`` as ``site_outcome`` and ``site_reason``), and the numbers ``graph`` and
        ``head``. Calls that were refused have no heads; ``explain(recipe).to_records()`` has a row for every call.
        """
        return [
            {"graph": number, "site": site.name, "head": index, **_head_record(site, index), **_site_record(site)}
            for number, graph in enumerate(self.graphs)
            for site in graph.sites
            for index in range(len(site.heads))
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as JSON; the file appears whole or not at all.

        Raises:
            OSError: the folder is missing or not writable.
        """
        write_whole(Path(path), self.to_json())

    def save_pretrained(self, folder: str | os.PathLike[str], *, name: str = "owner/name") -> None:
        """Write ``afbs_recipe.json`` into a folder, and a README.md that shows it where the folder has none.

        Args:
            folder: made where it is missing; name: what the README calls the recipe by.

        Raises:
            OSError: the folder cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / HUB_FILE)
        if not (Path(folder) / "README.md").exists():
            write_whole(Path(folder) / "README.md", self._card(name))

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | os.PathLike[str], **options: Any) -> Recipe:
        """Read ``afbs_recipe.json`` of a folder or of a repository on the Hugging Face Hub.

        Args:
            repo_or_folder: a folder, or ``"owner/name"``.
            options: of ``huggingface_hub.hf_hub_download``: ``revision``, ``token``, ``cache_dir``, ...

        Raises:
            RecipeError: there is none, or it is damaged; one sentence.
        """
        if Path(repo_or_folder).is_dir():
            return cls.load(Path(repo_or_folder) / HUB_FILE)
        return cls.load(downloaded(str(repo_or_folder), HUB_FILE, **options))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Sparse attention recipe",
    ) -> str:
        """Put the recipe into a repository on the Hugging Face Hub, the model's own or another.

        A README.md that shows it goes along where the repository has none.

        Args:
            repo_id: ``"owner/name"``, made where it is missing.
            private: whether a new repository is; token: by default the one logged in.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            RecipeError: huggingface_hub is not installed. What it raises itself comes as it is.
        """
        files = {HUB_FILE: self.to_json()}
        once = {"README.md": self._card(repo_id)}
        return uploaded(repo_id, files, once, message=commit_message, private=private, token=token)

    def to_json(self, *, sealed: bool = False) -> str:
        """The text of a recipe's file.

        Args:
            sealed: with a digest of its content, which :meth:`from_json` holds against it.
        """
        data = asdict(self)
        seal = {DIGEST: _digest(data)} if sealed else {}
        return json.dumps({**seal, **data}, indent=1, allow_nan=False) + "\n"

    def _card(self, name: str) -> str:
        samples = [graph.samples for graph in self.graphs]
        facts = {
            "goal": f"{self.goal}, method {self.method}",
            "calibrated on": f"{max(s.count for s in samples)} inputs of at most {max(s.lengths[1] for s in samples)} "
            f"tokens ({samples[0].source})",
            "device": f"{self.device}, engine {self.engine}",
            "mean sparsity": f"{self.sparsity:.1%}",
            "versions": ", ".join(f"{what} {number}" for what, number in self.versions.items()),
        }
        return card(name, facts, self.to_records())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: the file is missing, damaged, not a recipe, or of another schema version; one sentence.
        """
        try:
            text = read_regular(Path(path), LARGEST).decode("utf-8")
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise RecipeError(f"recipe {path} is damaged: it is not text ({error}).") from error
        return cls.from_json(text, f"recipe {path}")

    @classmethod
    def from_json(cls, text: str, name: str = "the recipe", *, sealed: bool = False) -> Recipe:
        """Read a recipe's text.

        Args:
            text: as :meth:`to_json` makes it; name: what an error calls it.
            sealed: whether it must have a digest of its content; one that it has is looked at in any case.

        Raises:
            RecipeError: it is damaged, not a recipe, or of another schema version; one sentence.
        """
        try:
            data = parsed(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise RecipeError(f"{name} is not an afbs recipe: its 'format' is not {FORMAT!r}.")
            version = data.get("schema_version")
            if type(version) is not int or version not in (SCHEMA_VERSION, *ALIKE_SCHEMAS, EARLIER_SCHEMA):
                age = "newer than" if isinstance(version, int) and version > SCHEMA_VERSION else "not"
                what = f"schema version {shown(version)}, {age} the {SCHEMA_VERSION} read here"
                raise RecipeError(f"{name} has {what}: calibrate again.")
            seal = data.pop(DIGEST, None)
            if (sealed or seal is not None) and seal != _digest(data):
                raise DamagedError("its content is not that of which it has the digest")
            if version == EARLIER_SCHEMA:
                data = upgraded(data)
            recipe: Recipe = decode(cls, {**data, "schema_version": SCHEMA_VERSION}, "recipe")
            _check(recipe)
        except DamagedError as error:
            raise RecipeError(f"{name} is damaged: {error}.") from error
        return recipe


def _digest(data: Mapping[str, Any]) -> str:
    """Of what a file says, in whatever order and layout."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def merged(recipes: Sequence[Recipe]) -> Recipe | None:
    """One recipe of all graphs, each once; the first recipe says all else, ``None`` of none.

    Args:
        recipes: of the graphs of one model, made under the same options.
    """
    if not recipes:
        return None
    graphs = [graph for recipe in recipes for graph in recipe.graphs]
    return replace(recipes[0], graphs=tuple(g for i, g in enumerate(graphs) if g not in graphs[:i]))


def _head_record(site: SiteRecipe, index: int) -> dict[str, Any]:
    head, constants = site.heads[index], site.calibrated.of_head(index)
    return {**constants, **{f.name: getattr(head, f.name) for f in fields(head) if f.name != "search"}}


def _site_record(site: SiteRecipe) -> dict[str, Any]:
    call = site.calibrated
    names = ("mask", "head_dim", "kv_heads", "dtype", "dense_ms", "sparse_ms", "validated_lengths")
    return {
        "site_outcome": site.outcome,
        "site_reason": site.reason,
        **{name: getattr(site, name) for name in (*names, "kernel", "kernel_reason")},
        "block_q": call.shape.q,
        "block_k": call.shape.k,
        "block_heads": call.shape.heads,
        "min_length": call.min_length,
        **call.kept._asdict(),
    }


def _check(recipe: Recipe) -> None:
    """Refuse what no calibration writes and the type of no single field tells."""
    tolerance = recipe.options.get("tolerance")
    budget = recipe.budget
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float | Mapping | None):
        raise DamagedError(f"tolerance is {shown(tolerance)}")
    if isinstance(tolerance, int | float):
        Range(0, 1, inside=True).check(tolerance, "tolerance")
    if isinstance(tolerance, int | float) == (budget is not None):
        raise DamagedError("it needs either a tolerance or a budget")
    if budget is not None and isinstance(tolerance, Mapping) and tolerance != {budget.quantity: budget.limit}:
        raise DamagedError(f"tolerance is {shown(tolerance)}, which is not its budget")
    if recipe.method not in METHODS:
        raise DamagedError(f"method is {shown(recipe.method)}, not one of {', '.join(map(repr, METHODS))}")
    if not recipe.graphs:
        raise DamagedError("it has no graph")
    for graph in recipe.graphs:
        _check_span(graph.samples.lengths, "lengths of the samples")
        if graph.promise is not None and graph.promise.deciding > graph.promise.inputs:
            raise DamagedError("more inputs decided than there were")
        for site in graph.sites:
            _check_site(site)
        names = Counter(site.name for site in graph.sites)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise DamagedError(f"two of its calls are named {shown(repeated[0])}")


def _check_span(span: tuple[int, int], what: str) -> None:
    if span[0] > span[1]:
        raise DamagedError(f"{what} are from {span[0]} to {span[1]}")


def _check_site(site: SiteRecipe) -> None:
    if site.outcome == "refused":
        return
    name = cut(site.name)
    if site.call is None or not site.heads or len(site.heads) != site.call.heads:
        raise DamagedError(f"{name} is {site.outcome} and has no heads, or no constants of them")
    try:
        mask_of(str(site.mask))
    except ValueError as error:
        raise DamagedError(f"{name}: {error}") from error
    if site.kv_heads is None or site.head_dim is None or site.call.heads % site.kv_heads:
        raise DamagedError(f"{name} has {site.call.heads} heads of {site.head_dim} over {site.kv_heads}")
    if site.dtype not in DTYPE_NAMES:
        raise DamagedError(f"{name} has dtype {shown(site.dtype)}, not one of {', '.join(DTYPE_NAMES)}")
    if site.validated_lengths is not None:
        _check_span(site.validated_lengths, f"validated lengths of {name}")
    count = fp8_constant_count(site.kv_heads, site.head_dim)
    if "fp8" in site.call.precision and len(site.call.fp8_constants) != count:
        raise DamagedError(f"{name} has heads in FP8 and not the constants of its key heads")
    for index, head in enumerate(site.heads):
        _check_head(site.call.of_head(index), head, f"head {index} of {name}")


def _check_head(constants: Mapping[str, Any], head: HeadRecipe, name: str) -> None:
    tau = constants["tau"]
    if not 0 <= tau <= KEEP_ALL or constants["theta"] > 1:
        raise DamagedError(f"{name} has tau or theta out of range")
    if (tau == KEEP_ALL) != (head.outcome == "dense"):
        raise DamagedError(f"{name} is {head.outcome} and has tau {tau}")
    for path in head.search:
        columns = {len(c) for c in (path.tau, path.theta, path.lam, path.sparsity, path.error, path.s or path.tau)}
        if len(columns) != 1:
            raise DamagedError(f"{name} has a search path whose columns differ in length")
        if not {*path.shape.rows} <= {*BLOCKS} or path.shape.heads not in BLOCK_HEADS:
            raise DamagedError(f"{name} has a search path over blocks of {path.shape}")
        if any(-1 < error < 0 for error in path.error):
            raise DamagedError(f"{name} has a search path with an error below 0")
