"""How one attention call is made sparse: the value that recipe, graph, operator, tuner, reports and exports hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from afbs_compile.errors import shown
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.registry import POLICIES, UNNAMED, policy_named

KEEP_ALL = 1.0
"""``tau`` at or above this keeps every block of the head: the head is DENSE."""

THETA_OFF = -1.0
"""Self-similarity lies in [0, 1], so no block is ever below a negative ``theta``."""

LAMBDA_OFF = -1000.0
"""2**-1000 is zero in every dtype we take, so this ``lam`` skips nothing that could be seen: DENSE-lambda, what
calibration chooses. Testing tiles costs more than skipping them saves (``benchmarks/kernels.py --cases lambda``)."""

BLOCKS = (16, 32, 64, 128)

BLOCK_HEADS = (1, 2, 4, 8)

LONGEST = 2**31 - 1
"""Tokens; the operator multiplies two lengths in 64 bits."""

PRECISIONS = ("own", "fp8")
"""``"own"``: that of the operands; ``"fp8"``: :mod:`afbs_compile.kernels.spec.fp8`."""

SIGNIFICANT_DIGITS = 6


class Kept(NamedTuple):
    """The blocks that every tau keeps, beside those that hold a query block's own positions.

    Attributes:
        last_rows: 0 or more; every block of a query block that holds one of this many last rows. Those rows answer:
            what a language model says next is read off the last one, and they have the whole text to find it in.
        local_keys: 0 or more; the blocks that hold one of this many keys right before a query block. Its first rows
            have few keys of their own block to look back at, and what came just before a token matters to it the most.
    """

    last_rows: int = 0
    local_keys: int = 0


@dataclass(frozen=True)
class SparseCall:
    """Constants of a sparse attention call; it checks itself.

    Attributes:
        tau: per query head, how much is kept, as the head's policy means it; from :data:`KEEP_ALL` on everything.
        theta: per head, self-similarity below which a block is always kept; negative: off.
        lam: per head, skip threshold in log2 units, at most 0; :data:`LAMBDA_OFF`: off.
        policy: per head, what scores the key blocks, by name (:mod:`afbs_compile.kernels.policies`).
        shape: rows per block, and how many heads share a selection; these have one policy and one precision.
        kept: which blocks every tau keeps; by default, as of calls that were not calibrated and of ``method="paper"``,
            only those with a query block's own positions.
        precision: per head, one of :data:`PRECISIONS`; left out: ``"own"`` for all.
        fp8_constants: for heads in FP8, what samples say of keys and values: :func:`fp8_constant_count` numbers; empty
            where nothing is known.
        min_length: calls of less work run dense: fewer (row, key) pairs than so many rows over as many keys;
            max_length: calls over more keys do; 0 for no such limit.

    Raises:
        ValueError: naming the argument, what came and what is accepted.
    """

    tau: tuple[float, ...]
    theta: tuple[float, ...]
    lam: tuple[float, ...]
    policy: tuple[str, ...]
    shape: BlockShape
    kept: Kept = field(default_factory=Kept)
    precision: tuple[str, ...] = ()
    fp8_constants: tuple[float, ...] = ()
    min_length: int = 0
    max_length: int = 0

    def __post_init__(self) -> None:
        if not self.precision:
            object.__setattr__(self, "precision", ("own",) * len(self.tau))
        self._check_per_head()
        self._check_blocks()
        self._check_block_heads()
        self._check_fp8()

    @classmethod
    def uniform(
        cls, heads: int, tau: float, *, policy: str = UNNAMED, theta: float = THETA_OFF, **other: Any
    ) -> SparseCall:
        """A call whose heads are alike.

        Args:
            heads: query heads; tau, theta, policy: of each.
            other: fields of the class that are not per head; ``shape`` is 64 x 64 by default.
        """
        other.setdefault("shape", BlockShape(64, 64))
        return cls((tau,) * heads, (theta,) * heads, (LAMBDA_OFF,) * heads, (policy,) * heads, **other)

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.tau)

    @property
    def dense_heads(self) -> tuple[bool, ...]:
        """Per head, whether it keeps every block."""
        return tuple(tau >= KEEP_ALL for tau in self.tau)

    @property
    def is_dense(self) -> bool:
        """Whether every head is DENSE."""
        return all(self.dense_heads)

    @property
    def uses_lambda(self) -> bool:
        """Whether any head may skip products with V."""
        return max(self.lam, default=LAMBDA_OFF) > LAMBDA_OFF

    def of_head(self, index: int) -> dict[str, Any]:
        """The constants of one head, by name."""
        return {name: getattr(self, name)[index] for name in PER_HEAD}

    def with_tau(self, tau: Tensor) -> SparseCall:
        """The call at other taus, ``[H]``."""
        return replace(self, tau=tuple(tau.tolist()))

    def where(self, take: Sequence[bool], other: SparseCall) -> SparseCall:
        """This call's thresholds, policies and precisions for the heads in ``take``, the other's for the rest."""
        columns: dict[str, Any] = {}
        for name in PER_HEAD:
            pairs = zip(take, getattr(self, name), getattr(other, name), strict=True)
            columns[name] = tuple(mine if taken else its for taken, mine, its in pairs)
        return replace(self, **columns)

    def in_own_precision(self) -> SparseCall:
        """The call with every head in the precision of the operands."""
        return replace(self, precision=(), fp8_constants=())

    def taken(self, heads: Sequence[int], kv_heads: int) -> SparseCall:
        """The call of some query heads, as :meth:`Operands.taken` takes them: itself if those are all.

        Args:
            heads: which ones; kv_heads: key heads of this call, whose FP8 constants go along.
        """
        if list(heads) == list(range(self.heads)):
            return self
        return self._of_heads(heads, [head * kv_heads // self.heads for head in heads], kv_heads)

    def grouped(self, first: int, last: int, kv_heads: int) -> SparseCall:
        """The call of the query heads ``first..last``, whole groups, as :meth:`Operands.grouped` views them."""
        groups = self.heads // kv_heads
        return self._of_heads(range(first, last), range(first // groups, last // groups), kv_heads)

    def _of_heads(self, heads: Sequence[int], keys: Sequence[int], kv_heads: int) -> SparseCall:
        width = len(self.fp8_constants) // kv_heads
        columns: dict[str, Any] = {name: tuple(getattr(self, name)[head] for head in heads) for name in PER_HEAD}
        constants = tuple(x for key in keys for x in self.fp8_constants[key * width : (key + 1) * width])
        return replace(self, **columns, fp8_constants=constants)

    def dense_at(self, q_len: int, k_len: int) -> bool:
        """Whether a call on so many rows and keys runs dense."""
        return q_len * k_len < self.min_length**2 or 0 < self.max_length < k_len or self.is_dense

    def rounded(self) -> SparseCall:
        """The call as it is written into a graph: six significant digits, so that a reader can compare them."""
        lists: dict[str, Any] = {name: tuple(map(_rounded, getattr(self, name))) for name in ("tau", "theta", "lam")}
        return replace(self, **lists)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operator; what it takes by default is left out."""
        given: dict[str, Any] = {name: list(getattr(self, name)) for name in ("tau", "theta", "lam")}
        given |= {"block_q": self.shape.q, "block_k": self.shape.k, "min_length": self.min_length}
        if self.shape.heads > 1:
            given["block_heads"] = self.shape.heads
        if self.max_length:
            given["max_length"] = self.max_length
        if set(self.policy) - {UNNAMED}:
            given["policy"] = list(self.policy)
        if "fp8" in self.precision:
            given["precision"] = list(self.precision)
            given |= {"fp8_constants": list(self.fp8_constants)} if self.fp8_constants else {}
        return given | {name: value for name, value in self.kept._asdict().items() if value}

    @classmethod
    def of_arguments(cls, heads: int, given: Mapping[str, Any]) -> SparseCall:
        """The call from the operator's arguments, the inverse of :meth:`arguments`; other entries are not looked at.

        Args:
            heads: query heads of the operands, which the lists must match.
            given: by name; what is missing or ``None`` is as by default.
        """
        present = {name: value for name, value in given.items() if value is not None}
        if "fp8_constants" in present and "precision" not in present:
            raise ValueError("fp8_constants came without precision; accepted: together with heads of precision fp8")
        lists = tuple((name, tuple(present.get(name, ()))) for name in (*PER_HEAD, "fp8_constants"))
        return _of_arguments(heads, lists, tuple((name, present.get(name, default)) for name, default in NUMBERS))

    def check_operands(self, operands: Operands) -> None:
        """Refuse operands that do not fit the call; only shapes are read.

        Raises:
            ValueError: naming the argument, what came and what is accepted.
        """
        heads, kv_heads, dim = operands.heads, operands.k.shape[1], operands.q.shape[3]
        if self.heads != heads:
            raise ValueError(_count("tau", self.heads, "constants", heads))
        if operands.groups % self.shape.heads:
            raise ValueError(
                f"block_heads is {self.shape.heads} and {operands.groups} query heads share a key head; accepted: a "
                f"number that divides those"
            )
        count = fp8_constant_count(kv_heads, dim)
        if self.fp8_constants and len(self.fp8_constants) != count:
            raise ValueError(
                f"fp8_constants has {len(self.fp8_constants)} numbers; accepted: {count}, {dim} means and two peaks "
                f"for each of the {kv_heads} key heads"
            )

    def _check_per_head(self) -> None:
        heads = len(self.tau)
        for name in ("tau", "theta", "lam"):
            values = getattr(self, name)
            if len(values) != heads:
                raise ValueError(
                    f"{name} has {len(values)} constants; accepted: one for each of the {heads} query heads"
                )
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{name} is {shown(list(values))}; accepted: finite numbers")
        if self.lam and max(self.lam) > 0.0:
            raise ValueError(
                f"lam is {shown(list(self.lam))}; accepted: numbers at most 0 (log2 units under the running maximum)"
            )
        for what, names in (("policy", self.policy), ("precision", self.precision)):
            if len(names) != heads:
                raise ValueError(_count(what, len(names), "names", heads))
        for name, theta in zip(self.policy, self.theta, strict=True):
            if theta >= 0.0 and not policy_named(name).has_theta:
                some = ", ".join(policy.name for policy in POLICIES.values() if policy.has_theta)
                raise ValueError(
                    f"theta is {theta} for a head of policy {name}; accepted: negative, only {some} has one"
                )
            policy_named(name)

    def _check_blocks(self) -> None:
        for name, block in (("block_q", self.shape.q), ("block_k", self.shape.k)):
            if block not in BLOCKS:
                raise ValueError(f"{name} is {shown(block)}; accepted: {', '.join(map(str, BLOCKS))}")
        if self.shape.q % self.shape.k:
            raise ValueError(
                f"block_q is {self.shape.q} and block_k is {self.shape.k}; accepted: block_q a multiple of block_k"
            )
        tokens = {**self.kept._asdict(), "min_length": self.min_length, "max_length": self.max_length}
        for name, value in tokens.items():
            if not 0 <= value <= LONGEST:
                accepted = "0 or more" if value < 0 else f"at most {LONGEST}"
                raise ValueError(f"{name} is {shown(value)}; accepted: {accepted}")

    def _check_block_heads(self) -> None:
        together = self.shape.heads
        if together not in BLOCK_HEADS or self.heads % together:
            fitting = ", ".join(str(number) for number in BLOCK_HEADS if self.heads % number == 0)
            raise ValueError(f"block_heads is {shown(together)}; accepted for {self.heads} heads: {fitting}")
        if together == 1:
            return
        for name in ("policy", "precision"):
            values = getattr(self, name)
            if any(values[h] != values[h - h % together] for h in range(self.heads)):
                raise ValueError(
                    f"{name} is {shown(list(values))}; accepted: one name for each {together} heads that share a "
                    f"selection (block_heads)"
                )

    def _check_fp8(self) -> None:
        for name in self.precision:
            if name not in PRECISIONS:
                raise ValueError(f"precision is {shown(name)}; accepted: {', '.join(PRECISIONS)}")
        if not math.isfinite(sum(self.fp8_constants)):  # one is enough, and thousands take time to look at
            raise ValueError("fp8_constants has a number that is not finite; accepted: finite numbers")


PER_HEAD = ("tau", "theta", "lam", "policy", "precision")
"""Fields of :class:`SparseCall` that have an entry for each head."""

NUMBERS = (
    ("block_q", 64),
    ("block_k", 64),
    ("block_heads", 1),
    ("min_length", 0),
    ("max_length", 0),
    ("last_rows", 0),
    ("local_keys", 0),
)
"""The operator's whole numbers and what they are by default."""


def fp8_constant_count(kv_heads: int, dim: int) -> int:
    """Numbers that a call's FP8 constants are carried as: for each key head its D means and its two peaks."""
    return kv_heads * (dim + 2)


def _count(name: str, came: int, what: str, heads: int) -> str:
    return f"{name} has {came} {what}; accepted: one for each of the {heads} query heads"


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


@functools.lru_cache(maxsize=256)  # a graph's calls come again and again, and checking takes longer than launching
def _of_arguments(
    heads: int, lists: tuple[tuple[str, tuple[Any, ...]], ...], numbers: tuple[tuple[str, int], ...]
) -> SparseCall:
    given: dict[str, Any] = {**dict(lists), **dict(numbers)}
    if len(given["tau"]) != heads:
        raise ValueError(_count("tau", len(given["tau"]), "constants", heads))
    shape = BlockShape(given.pop("block_q"), given.pop("block_k"), given.pop("block_heads"))
    kept = Kept(given.pop("last_rows"), given.pop("local_keys"))
    return SparseCall(**{**given, "policy": given["policy"] or (UNNAMED,) * heads}, shape=shape, kept=kept)
