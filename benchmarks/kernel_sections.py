"""What the kernel benchmark measures beside its table: predictor, imbalance, lambda, memory, short sequences."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Blocks, Case, exact_rows, operands, relative_l1, sparsity_of, thresholds_for
from peers import dense_sdpa
from timing import replayed, times
from torch import Tensor, nn

import afbs_compile
from afbs_compile.backend import afbs
from afbs_compile.kernels import flex
from afbs_compile.kernels.op import sparse_attention_with_counts
from afbs_compile.kernels.predict import BlockLists, lists_to_mask, predict_blocks
from afbs_compile.kernels.reference import LAMBDA_OFF, THETA_OFF
from afbs_compile.kernels.serving import SparseCall

PREDICTOR_SHARES = {8192: 0.08, 32768: 0.04, 131072: 0.03}
"""Largest accepted share of the dense time, by length."""

LARGEST_MEMORY_SHARE = 0.05
SMALLEST_SHORT_RATIO = 0.97
BLOCKS: tuple[Blocks, ...] = ((128, 128), (128, 64), (64, 64))
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


def off(case: Case) -> tuple[list[float], list[float]]:
    """theta and lambda that switch their tests off."""
    return [THETA_OFF] * case.heads, [LAMBDA_OFF] * case.heads


def ours(q: Tensor, k: Tensor, v: Tensor, case: Case, tau: list[float], blocks: Blocks) -> Callable[[], Tensor]:
    """The operator: predictor, lists and attention."""
    call: dict[str, Any] = {"causal": case.causal, "block_q": blocks[0], "block_k": blocks[1]}
    if case.precision is not None:
        call["precision"] = case.precision
    constants = tau, *off(case)
    return lambda: sparse_attention_with_counts(q, k, v, *constants, **call)[0]


def predict(q: Tensor, k: Tensor, case: Case, tau: list[float], blocks: Blocks) -> BlockLists:
    """The predictor alone."""
    return predict_blocks(q, k, tau, off(case)[0], causal=case.causal, block_q=blocks[0], block_k=blocks[1])


def engines(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The attention kernels of this package that may run on the device, by name."""
    if device.type != "cuda":
        return {"flex": _flex}
    from afbs_compile.kernels import block_sparse

    found: dict[str, Callable[..., Tensor]] = {"portable": block_sparse.attend}
    if importlib.util.find_spec("afbs_compile.kernels.hopper"):
        found["hopper"] = importlib.import_module("afbs_compile.kernels.hopper").attend
    return found


def _flex(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, lam: list[float], **call: Any) -> Tensor:
    return flex.attend(q, k, v, lists_to_mask(lists, lists.indices.shape[-1]), **call)


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
        for causal in (False, True):
            case = Case("predictor", run.length(length), causal, 0.7)
            q, k, v = operands(case, run.device)
            calls: dict[str, Callable[[], Any]] = {"dense": dense_sdpa(q, k, v, case)}
            for blocks in BLOCKS:
                tau, lists = thresholds_for(case, q, k, blocks)
                call = _predictor_call(q, k, case, tau, blocks)
                name = "{}x{}".format(*blocks)
                calls[name], calls[name + " graph"] = call, replayed(call)
                calls[name + " op"] = ours(q, k, v, case, tau, blocks)
                calls[name + " attention"] = _attention(q, k, v, case, lists, blocks)
            measured = times(calls, run.rounds_at(case.length))
            dense = measured.pop("dense").median
            for name in [key for key in measured if " " not in key]:
                ms, device_ms = measured[name].median, measured[name + " graph"].median
                visible_ms = measured[name + " op"].median - measured[name + " attention"].median
                _report(
                    rows,
                    "{length:6} causal={causal!s:5} {blocks:8} adds {visible_ms:.3f} ms = {visible_share:.1%} of dense "
                    "to a call; alone {ms:.3f} ms = {share:.1%}, on the device {device_ms:.3f} ms = "
                    "{device_share:.1%}; asked at most {asked:.0%}",
                    length=case.length,
                    causal=causal,
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


def _attention(q: Tensor, k: Tensor, v: Tensor, case: Case, lists: BlockLists, blocks: Blocks) -> Callable[[], Tensor]:
    """The attention that the operator would run, over given lists: the last engine that takes the call."""
    call = {"causal": case.causal, "block_q": blocks[0], "block_k": blocks[1]}
    for attend in reversed(engines(q.device).values()):
        try:
            attend(q, k, v, lists, off(case)[1], **call)
        except ValueError:
            continue
        return lambda attend=attend: attend(q, k, v, lists, off(case)[1], **call)
    raise ValueError(f"no engine takes {case}")


def _predictor_call(q: Tensor, k: Tensor, case: Case, tau: list[float], blocks: Blocks) -> Callable[[], BlockLists]:
    return lambda: predict(q, k, case, tau, blocks)


def imbalance(run: Run) -> Rows:
    """One head dense and one 95 % sparse in a launch, against the same live work spread evenly over the heads."""
    rows: Rows = []
    for heads, others in ((32, 0.7), (2, 0.7)):
        case = Case("imbalance", run.length(32768), True, 0.7, heads=heads, kv_heads=heads)
        q, k, v = operands(case, run.device)
        wanted = [0.0, 0.95, *[others] * (heads - 2)]
        for blocks in ((128, 128), (64, 64)):
            tau, lists = thresholds_for(case, q, k, blocks, wanted)
            mean = float(sparsity_of(lists, case, blocks).mean())
            even, even_lists = thresholds_for(case, q, k, blocks, [mean] * heads)
            calls = {name: ours(q, k, v, case, t, blocks) for name, t in (("uneven", tau), ("even", even))}
            error = relative_l1(calls["uneven"](), exact_rows(q, k, v, case, blocks, lists))
            measured = times(calls, run.rounds)
            live = [float(x.counts.sum()) for x in (lists, even_lists)]
            uneven_ms, even_ms = measured["uneven"].median, measured["even"].median
            _report(
                rows,
                "{heads:2} heads {blocks:8} uneven {uneven_ms:.3f} ms, even {even_ms:.3f} ms: {cost:.3f} times per "
                "live block, error {relative_l1:.1e}",
                heads=heads,
                blocks="{}x{}".format(*blocks),
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
    case = Case("lambda", run.length(32768), True, 0.7)
    q, k, v = operands(case, run.device)
    rows: Rows = []
    for blocks in ((128, 128), (64, 64)):
        _, lists = thresholds_for(case, q, k, blocks)
        truth = exact_rows(q, k, v, case, blocks, lists)
        kernel = SparseCall(q, k, v, off(case)[1], case.causal, *blocks).kernel().name
        calls = {"default": _attention(q, k, v, case, lists, blocks)}
        for lam in (LAMBDA_OFF, *LAMBDAS):
            calls[str(lam)] = _portable(q, k, v, case, lists, blocks, lam)
        measured = times(calls, run.rounds)
        for lam in (LAMBDA_OFF, *LAMBDAS):
            ms = measured[str(lam)].median
            _report(
                rows,
                "lambda {lam:7} {blocks:8} {ms:.3f} ms, {gain:.3f} times as fast as without, {overall:.3f} times as "
                "fast as the default ({default}), error {relative_l1:.1e}",
                lam=lam,
                blocks="{}x{}".format(*blocks),
                ms=ms,
                gain=measured[str(LAMBDA_OFF)].median / ms,
                overall=measured["default"].median / ms,
                default=kernel,
                relative_l1=relative_l1(calls[str(lam)](), truth),
            )
    return rows


def _portable(
    q: Tensor, k: Tensor, v: Tensor, case: Case, lists: BlockLists, blocks: Blocks, lam: float
) -> Callable[[], Tensor]:
    """Attention over given lists on the kernel that knows lambda."""
    from afbs_compile.kernels import block_sparse

    call = {"causal": case.causal, "block_q": blocks[0], "block_k": blocks[1]}
    return lambda: block_sparse.attend(q, k, v, lists, [lam] * case.heads, **call)


def memory(run: Run) -> Rows:
    """Peak memory of a call beyond q, k, v and the output, as a share of those four."""
    rows: Rows = []
    for causal in (True, False):
        case = Case("memory", run.length(131072), causal, 0.7)
        q, k, v = operands(case, run.device)
        for blocks in BLOCKS:
            call = ours(q, k, v, case, [0.5] * case.heads, blocks)
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            size = call().nbytes
            extra = torch.cuda.max_memory_allocated() - before - size
            _report(
                rows,
                "{length} causal={causal!s:5} {blocks:8} {extra_mib:.0f} MiB = {share:.1%}; asked at most {asked:.0%}",
                length=case.length,
                causal=causal,
                blocks="{}x{}".format(*blocks),
                extra_mib=extra / 2**20,
                share=extra / (q.nbytes + k.nbytes + v.nbytes + size),
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
    longest = Case("short", 16384 if gpu else 8192, True, 0.7, heads=heads, kv_heads=heads, head_dim=dim, dtype=dtype)
    sample = operands(longest, run.device)
    model = _Attention().eval()
    recipe = afbs_compile.calibrate(model, [tuple(sample)])
    rows: Rows = []
    for dynamic in (False, True):
        torch._dynamo.reset()
        dense = torch.compile(model, dynamic=dynamic)
        sparse = torch.compile(model, backend=afbs, dynamic=dynamic, options={"recipe": recipe})
        sparse(*sample)
        for length in (512, 1024, 2048):
            qkv = operands(replace(longest, length=length), run.device)
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
                sparse_from=[site.min_length for site in recipe.sites],
            )
    return rows


def _call(model: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: model(*qkv)
