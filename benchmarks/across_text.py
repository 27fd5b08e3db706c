"""Do thresholds carry their error to text of another kind? Scores and rules compared on captured activations.

    python benchmarks/across_text.py                                              the shipped model, on any machine
    python benchmarks/across_text.py --model M --calibrate books.txt wiki.txt --test docs.txt --lengths 4096 16384

Every head's threshold is the sparsest whose worst error over the calibration windows stays within a limit; then it runs
on windows of other text: the files given and the standard library's Python code. The errors are those of block-sparse
attention itself (sum|O - O_dense| / sum|O_dense| per head and window), taken for all thresholds at once: with the key
blocks of a query block in the order in which tau lets them in, partial sums over them are the outputs of all taus. What
calibration always keeps comes first.

Scores: the policies' own, and an oracle that knows the true mass of every block. Rules: "mass" and "share", see
afbs_compile/kernels/policies/rules.py, and "floor": "share" without the root of the number of blocks. "static" is block
means, mass, calibrated on the first text alone; which of its heads exceed the tolerance, and in which rows their errors
lie, is said at the end.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHIPPED_MODEL, load, sample_runs, save, settings
from torch import Tensor
from torch.nn.functional import pad

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies import rules
from afbs_compile.kernels.policies.registry import policy_named
from afbs_compile.kernels.spec.selection import kept_blocks
from afbs_compile.passes.capture import capture
from afbs_compile.tuner.measure import kept_for

BLOCK = 64
SHAPE = BlockShape(BLOCK, BLOCK)
POINTS = 192
SCORES = ("meansim", "cumulant", "antidiagonal", "vertical_slash", "oracle")
RULES = ("mass", "share", "floor")
STATIC = "meansim, mass"
BY_BLOCK = f"{STATIC}, by block"
LIMIT = 0.85
"""Part of the tolerance that the calibration windows may use: what is left over is for text unlike them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder of a causal language model")
    parser.add_argument("--calibrate", nargs="+", default=["topics"], help="texts to calibrate on")
    parser.add_argument("--test", nargs="+", default=[], help="texts of other kinds, beside Python code")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--windows", type=int, nargs=2, default=[3, 4], help="of each calibration and each test text")
    parser.add_argument("--tolerance", type=float, default=0.055)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="across_text", help="name of the result file")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(arguments.model, device, getattr(torch, arguments.dtype))
    tokens = {
        Path(name).stem: torch.tensor(tokenizer(text_of(name), add_special_tokens=False, verbose=False).input_ids)
        for name in (*arguments.calibrate, *arguments.test, "code")
    }
    result: dict[str, Any] = {"settings": settings(arguments)}
    for length in arguments.lengths:
        kinds, windows = [], []
        for index, (kind, ids) in enumerate(tokens.items()):
            count = arguments.windows[index >= len(arguments.calibrate)]
            for start in torch.linspace(0, len(ids) - length, count).long().tolist():
                kinds.append(kind)
                windows.append(ids[None, start : start + length].to(device))
        curves = measure(model.model, windows)
        (by_block,) = curves.pop(BY_BLOCK)
        calibrated = [Path(name).stem for name in arguments.calibrate]
        rows = table(curves, kinds, calibrated, arguments.tolerance)
        reasons = why(curves, kinds, calibrated[0], arguments.tolerance)
        places = where(by_block, model.config.num_hidden_layers, kinds, calibrated[0], arguments.tolerance)
        result[str(length)] = {"rows": rows, "why": reasons, "where": places}
        show(length, rows, reasons, places)
        save(arguments.name, arguments.out, result)


def text_of(name: str) -> str:
    """A file's text; ``topics``: Python's help; ``code``: every fifth module of the standard library, by name."""
    if name == "topics":
        import pydoc_data.topics

        return "\n\n".join(pydoc_data.topics.topics.values())
    if name == "code":
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return "\n".join(path.read_text("utf-8") for path in modules[::5])
    return Path(name).read_text("utf-8")


Curves = dict[str, tuple[Tensor, ...]]
"""By "score, rule": error, sparsity and true mass left out, each ``[windows, heads of all sites, POINTS]``; at
:data:`BY_BLOCK` what each query block adds to the error, ``[windows, heads of all sites, blocks, POINTS]``."""


def measure(model: Any, windows: list[Tensor]) -> Curves:
    """The curves of every score and rule on every window."""
    runs = sample_runs(model, windows)
    sites: dict[str, list[Tensor]] = {}
    for _, operands in capture(runs):
        windows_of_site: dict[str, list[Tensor]] = {}
        for sample in operands:
            for name, values in site_curves(sample):
                windows_of_site.setdefault(name, []).append(values)
        for name, parts in windows_of_site.items():
            sites.setdefault(name, []).append(torch.stack(parts, 1))
    return {name: tuple(torch.cat(parts, 2).cpu()) for name, parts in sites.items()}


def site_curves(sample: Operands) -> Iterator[tuple[str, Tensor]]:
    """For every score and rule of one site and window: its name and ``[3, H, POINTS]``; likewise :data:`BY_BLOCK`."""
    q, k, v = (x.float() for x in (sample.q, sample.k, sample.v))
    sample = replace(sample, q=q, k=k, v=v)
    grid, count = sample.grid(SHAPE), q.shape[2] // BLOCK
    visible = sample.mask.visibility(grid, q.device).visible
    always = kept_blocks(sample, SHAPE, kept_for(sample))[0, 0]
    weights_of = _row_softmax(q, k, sample.scale)
    levels: dict[str, dict[str, Tensor]] = {}
    for name in (*SCORES, "sink_window"):
        if name == "oracle":
            masses = [weights_of(block).unflatten(-1, (-1, BLOCK)).sum(-1).mean(1) for block in range(count)]
            scores = torch.stack([pad(mass, (0, count - mass.shape[1])) for mass in masses], 1).log()[None]
        else:
            scores = policy_named(name).scores(sample, SHAPE)
        levels[name] = {
            rule: torch.where(always, rules.ALWAYS, levels_of(scores, rule, visible)).masked_fill(~visible, torch.inf)[
                0
            ]
            for rule in (RULES if name in SCORES else ("strength",))
        }
    # All rules let blocks in by descending score: one order serves them.
    orders = {
        name: next(iter(of_rules.values())).sort(dim=-1, stable=True).indices for name, of_rules in levels.items()
    }
    sums, size = partial_sums(weights_of, v, orders)
    for name, of_rules in levels.items():
        for rule, level in of_rules.items():
            choice = f"{name}, {rule}"
            by_block, *curves = at_all_taus(level, *sums[name], size)
            yield choice, torch.stack(curves)
            if choice == STATIC:
                yield BY_BLOCK, by_block[None]


def levels_of(scores: Tensor, rule: Any, visible: Tensor) -> Tensor:
    """:func:`rules.levels`, also of the rule "floor": keep block j when ``p_j > (1 - tau) / tau``."""
    if rule == "floor":
        return rules.levels(rules.softmax(scores, visible).log(), "strength", visible)
    return rules.levels(scores, rule, visible)


def _row_softmax(q: Tensor, k: Tensor, scale: float) -> Callable[[int], Tensor]:
    """A function of a query block: the exact softmax of its rows over the keys up to its end, ``[H, BLOCK, end]``."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)[0].transpose(-1, -2)
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)

    def weights(block: int) -> Tensor:
        end = (block + 1) * BLOCK
        scores = q[0, :, end - BLOCK : end] @ keys[..., :end] * scale
        scores[..., -BLOCK:].masked_fill_(later, -torch.inf)
        return scores.softmax(-1)

    return weights


def partial_sums(
    weights_of: Callable[[int], Tensor], v: Tensor, orders: dict[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Error and true mass after each block of every order, ``[H, n, n]`` each, and ``sum|O_dense|``, ``[H]``."""
    heads, count = next(iter(orders.values())).shape[:2]
    values = v.repeat_interleave(heads // v.shape[1], 1)[0].unflatten(1, (count, BLOCK))
    size = torch.zeros(heads, device=v.device)
    sums = {
        name: (torch.zeros(heads, count, count, device=v.device), torch.ones(heads, count, count, device=v.device))
        for name in orders
    }
    for block in range(count):
        seen = block + 1
        weights = weights_of(block).unflatten(-1, (seen, BLOCK)).transpose(1, 2)
        parts, totals = weights @ values[:, :seen], weights.sum(-1)  # [H, seen, BLOCK, D] and [H, seen, BLOCK]
        dense = parts.sum(1, keepdim=True)
        size += dense.abs().sum((1, 2, 3))
        for name, order in orders.items():
            # o_n = sum of the first n blocks' outputs / sum of their weights
            rank = order[:, block, :seen].argsort(-1)
            among = (rank[:, None] <= torch.arange(seen, device=v.device)[:, None]).to(v.dtype)
            total = among @ totals
            outputs = (among @ parts.flatten(2)).unflatten(2, parts.shape[2:])
            error, mass = sums[name]
            error[:, block, :seen] = outputs.div_(total[..., None]).sub_(dense).abs_().sum((-1, -2))
            mass[:, block, :seen] = total.mean(-1)
    return sums, size


def at_all_taus(level: Tensor, error: Tensor, mass: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of :data:`POINTS` taus, from the densest: what each query block adds to the error, ``[H, blocks, POINTS]``, and
    error, sparsity and true mass left out, ``[H, POINTS]``."""
    heads, count, _ = level.shape
    odds = torch.logspace(-3, 2, POINTS, device=level.device)
    taus = (1 / (1 + odds)).expand(heads, count, -1).contiguous()
    live = torch.searchsorted(level.sort(-1).values, taus)
    errors = error.gather(-1, live - 1) / size[:, None, None]
    left = 1 - mass.gather(-1, live - 1).mean(1)
    return errors, errors.sum(1), 1 - live.sum(1) / (count * (count + 1) / 2), left


def operating_points(errors: Tensor, limit: float) -> Tensor:
    """Per head the sparsest point of the curve whose worst window stays within the limit; -1: dense."""
    return (errors.amax(0).cummax(-1).values <= limit).sum(-1) - 1


def read(curve: Tensor, index: Tensor) -> Tensor:
    """A curve ``[.., heads, POINTS]`` at the heads' operating points, ``[.., heads]``; 0 for dense ones."""
    values = curve.gather(-1, index.clamp_min(0).expand(curve.shape[:-1])[..., None])[..., 0]
    return torch.where(index < 0, 0.0, values)


def table(curves: Curves, kinds: list[str], calibrated: list[str], tolerance: float) -> list[dict[str, Any]]:
    """One row per score and rule and limit, the static choice first."""
    error, sparsity, _ = curves[STATIC]
    rows = [
        {"choice": "static", "limit": 1.0}
        | spread(error, sparsity, operating_points(error[of(kinds, calibrated[:1])], tolerance), kinds, tolerance)
    ]
    for name, (error, sparsity, _) in curves.items():
        for limit in (1.0, LIMIT):
            index = operating_points(error[of(kinds, calibrated)], limit * tolerance)
            rows.append({"choice": name, "limit": limit} | spread(error, sparsity, index, kinds, tolerance))
        reached = largest_limit(error, kinds, calibrated, tolerance)
        index = operating_points(error[of(kinds, calibrated)], reached * tolerance)
        rows.append({"choice": f"{name} at 90 %", "limit": reached} | spread(error, sparsity, index, kinds, tolerance))
    return rows


def of(kinds: list[str], chosen: list[str]) -> Tensor:
    """Which windows are of the chosen kinds."""
    return torch.tensor([kind in chosen for kind in kinds])


def spread(error: Tensor, sparsity: Tensor, index: Tensor, kinds: list[str], tolerance: float) -> dict[str, Any]:
    """Share of (head, window) pairs within the tolerance, worst error and mean sparsity of every kind of text."""
    result = {}
    for kind in dict.fromkeys(kinds):
        errors = read(error, index)[of(kinds, [kind])]
        result[kind] = {
            "within": float((errors <= tolerance).float().mean()),
            "worst": float(errors.max()),
            "sparsity": float(read(sparsity, index)[of(kinds, [kind])].mean()),
        }
    return result


def largest_limit(error: Tensor, kinds: list[str], calibrated: list[str], tolerance: float) -> float:
    """The largest part of the tolerance at which 90 % of the pairs of every other text stay within it."""
    low, high = 0.01, 2.0
    for _ in range(30):
        limit = (low * high) ** 0.5
        errors = read(error, operating_points(error[of(kinds, calibrated)], limit * tolerance))
        others = [kind for kind in dict.fromkeys(kinds) if kind not in calibrated]
        enough = all((errors[of(kinds, [kind])] <= tolerance).float().mean() >= 0.9 for kind in others)
        low, high = (limit, high) if enough else (low, limit)
    return low


def why(curves: Curves, kinds: list[str], first: str, tolerance: float) -> dict[str, Any]:
    """How the log of the error on other text differs from that of the first text's worst window, and through what.

    ``error = mass left out x error per mass``: mean and deviation of the logs over heads and windows, and their mean
    over those that exceed the tolerance. Apart: heads at the least tau, which keep a window of keys and nothing else.
    """
    result: dict[str, Any] = {}
    for name in (STATIC, "meansim, share", "cumulant, share", "oracle, mass", "oracle, share"):
        error, _, left = curves[name]
        mine = of(kinds, [first])
        index = operating_points(error[mine], tolerance)
        errors, masses = read(error, index).clamp_min(1e-6).log(), read(left, index).clamp_min(1e-5).log()
        worst, window = errors[mine].max(0)
        mass = masses[mine].gather(0, window[None])[0]
        for group, heads in _by_tau(index).items():
            for kind in dict.fromkeys(kinds):
                if kind == first or not heads.any():
                    continue
                some = of(kinds, [kind])
                change, of_mass = ((x - y)[some][:, heads] for x, y in ((errors, worst), (masses, mass)))
                exceeds = errors[some][:, heads] > math.log(tolerance)
                parts = {"error": change, "mass": of_mass, "error per mass": change - of_mass}
                result[f"{name}, {group}: {kind}"] = {
                    "heads": int(heads.sum()),
                    "exceed": float(exceeds.float().mean()),
                    **{part: [float(x.mean()), float(x.std())] for part, x in parts.items()},
                    **{f"{part}, exceeding": float(x[exceeds].mean()) for part, x in parts.items() if exceeds.any()},
                }
    return result


def _by_tau(index: Tensor) -> dict[str, Tensor]:
    """Which heads are at a tau that decides what they keep, and which at the least one; dense heads are neither."""
    return {"a tau that binds": (index >= 0) & (index < POINTS - 1), "the least tau": index == POINTS - 1}


def where(by_block: Tensor, layers: int, kinds: list[str], first: str, tolerance: float) -> dict[str, Any]:
    """Which heads exceed the tolerance with the static choice, and in which rows the errors of those lie.

    Of the first text, which is within the tolerance, the errors of all heads, for comparison.
    """
    index = operating_points(by_block[of(kinds, [first])].sum(2), tolerance)
    errors = read(by_block.transpose(1, 2), index).transpose(1, 2)
    result = {}
    for kind in dict.fromkeys(kinds):
        mine = errors[of(kinds, [kind])]
        exceeds = mine.sum(-1) > tolerance
        of_head = exceeds.float().mean(0)
        pairs = mine[exceeds] if exceeds.any() else mine.flatten(0, 1)
        shares = pairs / pairs.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        result[kind] = {
            "pairs that exceed": float(exceeds.float().mean()),
            "by layer": of_head.unflatten(0, (layers, -1)).mean(1).tolist(),
            "heads that never do": float((of_head == 0).float().mean()),
            "by the quarter of heads that do most": float(
                of_head.sort(descending=True).values[: len(of_head) // 4].sum() / of_head.sum().clamp_min(1e-9)
            ),
            "error by quarter of the window": [float(x.sum(-1).mean()) for x in shares.tensor_split(4, -1)],
            "error in the tenth of blocks with most": float(
                shares.sort(descending=True).values[:, : -(-shares.shape[1] // 10)].sum(-1).mean()
            ),
        }
    return result


def show(length: int, rows: list[dict[str, Any]], reasons: dict[str, Any], places: dict[str, Any]) -> None:
    print(f"\n{length} tokens: share within the tolerance / worst error / sparsity")
    for row in rows:
        cells = [
            f"{kind} {cell['within']:.2f} / {cell['worst']:.3f} / {cell['sparsity']:.3f}"
            for kind, cell in row.items()
            if isinstance(cell, dict)
        ]
        print(f"{row['choice']:30s} x{row['limit']:.2f}  " + "   ".join(cells))
    print(
        "log error, mass and error per mass against the first text's worst window: mean, deviation, mean of those over"
    )
    for name, values in reasons.items():
        cells = []
        for part in ("error", "mass", "error per mass"):
            mean, deviation = values[part]
            cells.append(f"{mean:+.2f} {deviation:.2f} {values.get(f'{part}, exceeding', math.nan):+.2f}")
        print(f"{name:50s} {values['heads']:3d} heads, {values['exceed']:.2f} exceed   " + "   ".join(cells))
    for kind, values in places.items():
        print(f"static, {kind}:")
        for name, value in values.items():
            print(f"    {name:40s}" + " ".join(f"{x:.2f}" for x in (value if isinstance(value, list) else [value])))


if __name__ == "__main__":
    main()
