"""What the kernel benchmark measures beside its table: predictor, imbalance, lambda, memory, short sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Case, exact_rows, operands, relative_l1, sparse, sparsity_of, thresholds_for
from peers import dense_sdpa
from timing import replayed, times
from torch import Tensor, nn

import afbs_compile
from afbs_compile.backend import afbs
from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.engines import engine_of, engines_on, family_on, kernel_of
from afbs_compile.kernels.attend.run import run as run_call
from afbs_compile.kernels.blocks import BlockLists, BlockShape
from afbs_compile.kernels.call import LAMBDA_OFF, SparseCall
from afbs_compile.kernels.operands import Operands, empty_output

PREDICTOR_SHARES = {8192: 0.08, 32768: 0.04, 131072: 0.03}
"""Largest accepted share of the dense time, by length."""

LARGEST_MEMORY_SHARE = 0.05
SMALLEST_SHORT_RATIO = 0.97
BLOCKS = (BlockShape(128, 128), BlockShape(128, 64), BlockShape(64, 64))
LAMBDAS = (-16.0, -10.0, -7.0)
QUICK, LONG = 8, 131072

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """Settings that all parts of a run share."""

    device: str
    rounds: int
    quick: bool

    def length(self, length: int) -> int:
        """The length as it is measured."""
        return length // QUICK if self.quick else length

    def rounds_at(self, length: int) -> int:
        """Samples of each call; half as many of calls that take a tenth of a second."""
        return max(3, self.rounds // 2) if length >= LONG else self.rounds

    def case(self, case: Case) -> Case:
        """The case at the length that is measured."""
        return replace(case, length=self.length(case.length))


def ours(call: Operands, case: Case, tau: list[float], shape: BlockShape) -> Callable[[], Tensor]:
    """The operator: predictor, lists and attention."""
    constants = sparse(case, tau, shape)
    return lambda: run_call(call, constants)[0]


def engines(device: torch.device) -> list[Engine]:
    """The engines of this package that may run on the device and that share its predictor, the quickest last.

    Always in the same order: a GPU limited by power runs a kernel the slower the hotter the one before it was.
    """
    return [engine for engine in reversed(engines_on(device)) if engine.family == family_on(device)]


def attention(engine: Engine, call: Operands, constants: SparseCall, lists: BlockLists) -> Callable[[], Tensor] | str:
    """One engine's attention over given lists, or why it does not take the call."""

    def attend() -> Tensor:
        out = empty_output(call.q, call.v)
        engine.attend(call, constants, lists, out)
        return out

    reason = engine.refusal(call, constants)
    return attend if reason is None else reason


def _report(rows: Rows, line: str, **row: Any) -> None:
    rows.append(row)
    print("  " + line.format(**row), flush=True)


def predictor(run: Run) -> Rows:
    """Predictor and lists as a share of dense SDPA.

    What they add to a call (the operator's time less that of its attention alone), themselves called back to back, and
    the device's time for them.
    """
    rows: Rows = []
    for length in PREDICTOR_SHARES:
        for mask in ("full", "causal"):
            case = Case("predictor", run.length(length), mask, 0.7)
            call = operands(case, run.device)
            calls: dict[str, Callable[[], Any]] = {"dense": dense_sdpa(call)}
            for shape in BLOCKS:
                tau, lists = thresholds_for(case, call, shape)
                select = _predictor_call(call, case, tau, shape)
                name = str(shape)
                calls[name], calls[name + " graph"] = select, replayed(select)
                calls[name + " op"] = ours(call, case, tau, shape)
                calls[name + " attention"] = _attention(call, case, lists, shape)
            measured = times(calls, run.rounds_at(case.length))
            dense = measured.pop("dense").median
            for name in [key for key in measured if " " not in key]:
                ms, device_ms = measured[name].median, measured[name + " graph"].median
                visible_ms = measured[name + " op"].median - measured[name + " attention"].median
                _report(
                    rows,
                    "{length:6} {mask:6} {blocks:8} adds {visible_ms:.3f} ms = {visible_share:.1%} of dense "
                    "to a call; alone {ms:.3f} ms = {share:.1%}, on the device {device_ms:.3f} ms = "
                    "{device_share:.1%}; asked at most {asked:.0%}",
                    length=case.length,
                    mask=mask,
                    blocks=name,
                    visible_ms=visible_ms,
                    visible_share=visible_ms / dense,
                    ms=ms,
                    share=ms / dense,
                    device_ms=device_ms,
                    device_share=device_ms / dense,
                    dense_ms=dense,
                    asked=PREDICTOR_SHARES[length],
                )
    return rows


def _attention(call: Operands, case: Case, lists: BlockLists, shape: BlockShape) -> Callable[[], Tensor]:
    """The attention that the operator would run, over given lists."""
    constants = sparse(case, [0.5] * case.heads, shape)
    return _runs(attention(engine_of(call, constants)[0], call, constants, lists))


def _runs(call: Callable[[], Tensor] | str) -> Callable[[], Tensor]:
    """A call that is there.

    Raises:
        ValueError: it is refused.
    """
    if isinstance(call, str):
        raise ValueError(call)
    return call


def _predictor_call(call: Operands, case: Case, tau: list[float], shape: BlockShape) -> Callable[[], BlockLists]:
    constants = sparse(case, tau, shape)
    select = engines_on(call.device)[0].select
    return lambda: select(call, constants)


def imbalance(run: Run) -> Rows:
    """One head dense and one 95 % sparse in a launch, against the same live work spread evenly over the heads."""
    rows: Rows = []
    for heads, others in ((32, 0.7), (2, 0.7)):
        case = Case("imbalance", run.length(32768), "causal", 0.7, heads=heads, kv_heads=heads)
        call = operands(case, run.device)
        wanted = [0.0, 0.95, *[others] * (heads - 2)]
        for shape in (BLOCKS[0], BLOCKS[2]):
            tau, lists = thresholds_for(case, call, shape, wanted)
            mean = float(sparsity_of(lists, case, shape).mean())
            even, even_lists = thresholds_for(case, call, shape, [mean] * heads)
            calls = {name: ours(call, case, t, shape) for name, t in (("uneven", tau), ("even", even))}
            error = relative_l1(calls["uneven"](), exact_rows(call, case, shape, lists))
            measured = times(calls, run.rounds)
            live = [float(x.counts.sum()) for x in (lists, even_lists)]
            uneven_ms, even_ms = measured["uneven"].median, measured["even"].median
            _report(
                rows,
                "{heads:2} heads {blocks:8} uneven {uneven_ms:.3f} ms, even {even_ms:.3f} ms: {cost:.3f} times per "
                "live block, error {relative_l1:.1e}",
                heads=heads,
                blocks=str(shape),
                mean_sparsity=mean,
                uneven_ms=uneven_ms,
                even_ms=even_ms,
                cost=uneven_ms / even_ms * live[1] / live[0],
                relative_l1=error,
            )
    return rows


def negligible_tiles(run: Run) -> Rows:
    """What lambda gains, and what it adds to the error, on operands whose tiles it can skip.

    The Hopper kernel takes no lambda: with and without it are compared on the portable kernel, and both with what the
    operator runs by default.
    """
    case = Case("lambda", run.length(32768), "causal", 0.7)
    call = operands(case, run.device)
    portable = next(engine for engine in engines(call.device) if engine.name == "portable")
    rows: Rows = []
    for shape in (BLOCKS[0], BLOCKS[2]):
        tau, lists = thresholds_for(case, call, shape)
        truth = exact_rows(call, case, shape, lists)
        kernel = kernel_of(call, sparse(case, tau, shape)).name
        calls = {"default": _attention(call, case, lists, shape)}
        for lam in (LAMBDA_OFF, *LAMBDAS):
            calls[str(lam)] = _runs(attention(portable, call, sparse(case, tau, shape, lam), lists))
        measured = times(calls, run.rounds)
        for lam in (LAMBDA_OFF, *LAMBDAS):
            ms = measured[str(lam)].median
            _report(
                rows,
                "lambda {lam:7} {blocks:8} {ms:.3f} ms, {gain:.3f} times as fast as without, {overall:.3f} times as "
                "fast as the default ({default}), error {relative_l1:.1e}",
                lam=lam,
                blocks=str(shape),
                ms=ms,
                gain=measured[str(LAMBDA_OFF)].median / ms,
                overall=measured["default"].median / ms,
                default=kernel,
                relative_l1=relative_l1(calls[str(lam)](), truth),
            )
    return rows


def memory(run: Run) -> Rows:
    """Peak memory of a call beyond q, k, v and the output, as a share of those four."""
    rows: Rows = []
    for mask in ("causal", "full"):
        case = Case("memory", run.length(131072), mask, 0.7)
        call = operands(case, run.device)
        for shape in BLOCKS:
            attend = ours(call, case, [0.5] * case.heads, shape)
            attend()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            size = attend().nbytes
            extra = torch.cuda.max_memory_allocated() - before - size
            _report(
                rows,
                "{length} {mask:6} {blocks:8} {extra_mib:.0f} MiB = {share:.1%}; asked at most {asked:.0%}",
                length=case.length,
                mask=mask,
                blocks=str(shape),
                extra_mib=extra / 2**20,
                share=extra / (call.q.nbytes + call.k.nbytes + call.v.nbytes + size),
                asked=LARGEST_MEMORY_SHARE,
            )
    return rows


class _Attention(nn.Module):
    """The attention call alone: nothing in the graph hides what the rewrite costs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def short(run: Run) -> Rows:
    """At most 2K tokens through the backend, against inductor: the recipe comes from a longer, sparse sample."""
    gpu = run.device == "cuda"
    heads, dim, dtype = (32, 128, torch.bfloat16) if gpu else (4, 64, torch.float32)
    longest = Case(
        "short", 16384 if gpu else 8192, "causal", 0.7, heads=heads, kv_heads=heads, head_dim=dim, dtype=dtype
    )
    sample = _tensors(longest, run.device)
    model = _Attention().eval()
    recipe = afbs_compile.calibrate(model, [sample])
    rows: Rows = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        dense = torch.compile(model, dynamic=dynamic)
        sparse = torch.compile(model, backend=afbs, dynamic=dynamic, options={"recipe": recipe})
        sparse(*sample)
        for length in (512, 1024, 2048):
            qkv = _tensors(replace(longest, length=length), run.device)
            measured = times({"dense": _call(dense, qkv), "sparse": _call(sparse, qkv)}, run.rounds)
            ratio = measured["dense"].median / measured["sparse"].median
            _report(
                rows,
                "{length:5} tokens dynamic={dynamic!s:5} {ratio:.3f}x; asked at least {asked}x",
                length=length,
                dynamic=dynamic,
                dense_ms=measured["dense"].median,
                sparse_ms=measured["sparse"].median,
                ratio=ratio,
                asked=SMALLEST_SHORT_RATIO,
                sparse_from=[site.call.min_length for site in recipe.sites],
            )
    return rows


def _tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    call = operands(case, device)
    return call.q, call.k, call.v


def _call(model: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: model(*qkv)
