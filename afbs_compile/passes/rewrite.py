"""Replace attention calls by ``afbs::sparse_attention`` with each head's constants written into the call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

import afbs_compile.kernels.op  # noqa: F401  registers the operator
from afbs_compile.kernels.policy import DEFAULT
from afbs_compile.kernels.reference import DIAGONAL_ONLY, Kept
from afbs_compile.passes.build import NodeBuilder, erase_unused
from afbs_compile.passes.site import AttentionSite
from afbs_compile.passes.unmask import unmask

SIGNIFICANT_DIGITS = 6

aten = torch.ops.aten


@dataclass(frozen=True)
class SiteConstants:
    """What the operator is given for one site, beside its tensors.

    Attributes:
        tau, theta, lam: one number per query head.
        block_q, block_k: rows per block.
        min_length: below it the operator computes dense attention; max_length: above it likewise, 0 for no limit.
        policy: one name per query head; empty means ``meansim`` for all.
        precision: one name per query head; empty means that of the operands for all.
        fp8_constants: for the heads of precision ``fp8``; empty where there is none.
        kept: which blocks every tau keeps, beside those on the diagonal.
    """

    tau: tuple[float, ...]
    theta: tuple[float, ...]
    lam: tuple[float, ...]
    block_q: int
    block_k: int
    min_length: int
    max_length: int = 0
    policy: tuple[str, ...] = ()
    precision: tuple[str, ...] = ()
    fp8_constants: tuple[float, ...] = ()
    kept: Kept = DIAGONAL_ONLY


@dataclass(frozen=True)
class Rewrite:
    """What :func:`rewrite` did.

    Attributes:
        changed: number of calls made sparse.
        before, after: the graph as readable Python.
    """

    changed: int
    before: str
    after: str


def rounded(value: float) -> float:
    """A constant as it is written into the graph: six significant digits, so that a reader can compare them."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def rewrite(
    gm: fx.GraphModule, plans: Mapping[AttentionSite, SiteConstants], unmasked: Sequence[AttentionSite] = ()
) -> Rewrite:
    """Replace the planned sites of a graph, in place, and erase what only they used.

    Only pure nodes are erased, and only those that lose their last user here: whatever draws random numbers, writes
    into a tensor or has another effect stays, used or not.

    Args:
        gm: the graph in which ``find`` found the sites.
        plans: constants of each site to replace; other calls stay as they are.
        unmasked: other sites, whose mask :func:`afbs_compile.passes.unmask.unmask` drops.

    Raises:
        ValueError: a site's constants do not match its heads; the graph is then unchanged.
    """
    for site, constants in plans.items():
        _check(site, constants)
    before = _text(gm)
    if not plans and not unmasked:
        return Rewrite(0, before, before)
    for site, constants in plans.items():
        _replace(gm, site, constants)
    unmask(gm, unmasked)
    gm.graph.lint()
    gm.recompile()
    return Rewrite(len(plans), before, _text(gm))


def dump(rewrite: Rewrite, folder: str | os.PathLike[str], name: str) -> None:
    """Write ``<name>.before.py`` and ``<name>.after.py``; a reader never sees half a file.

    Args:
        rewrite: result of :func:`rewrite`.
        folder: created where it is missing.
        name: stem of the two files.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for suffix, text in (("before", rewrite.before), ("after", rewrite.after)):
        target = Path(folder) / f"{name}.{suffix}.py"
        partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        partial.write_text(text)
        partial.replace(target)


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _check(site: AttentionSite, constants: SiteConstants) -> None:
    for field in ("tau", "theta", "lam"):
        count = len(getattr(constants, field))
        if count != site.heads:
            raise ValueError(f"{site.name}: {count} values of {field} for {site.heads} heads")
    for field, what in (("policy", "policies"), ("precision", "precisions")):
        count = len(getattr(constants, field))
        if count not in (0, site.heads):
            raise ValueError(f"{site.name}: {count} names of {what} for {site.heads} heads")


def _replace(gm: fx.GraphModule, site: AttentionSite, constants: SiteConstants) -> None:
    operands = site.node.all_input_nodes
    build = NodeBuilder(site.node)
    q, k, v = (_four_d(build, node, site.rank) for node in (site.q, site.k, site.v))
    lists = {name: [rounded(value) for value in getattr(constants, name)] for name in ("tau", "theta", "lam")}
    sparse = build.call(
        torch.ops.afbs.sparse_attention.default,
        (q, k, v),
        {
            **lists,
            "is_causal": site.causal,
            "scale": site.scale,
            "block_q": constants.block_q,
            "block_k": constants.block_k,
            "min_length": constants.min_length,
            **({"max_length": constants.max_length} if constants.max_length else {}),
            **_named_policies(constants),
            **_named_precisions(constants),
            **{name: value for name, value in constants.kept._asdict().items() if value},
        },
    )
    if site.rank != 4:  # the output has the shape of q: one head_dim for all operands
        sparse = build.call(aten.reshape_as.default, (sparse, site.q))
    result = build.in_layout_of(site.node, sparse)
    site.node.replace_all_uses_with(result)
    gm.graph.erase_node(site.node)
    erase_unused(gm.graph, operands)


def _named_policies(constants: SiteConstants) -> dict[str, list[str]]:
    """The policies as an argument, unless all are the one that the operator takes by default."""
    return {"policy": list(constants.policy)} if set(constants.policy) - {DEFAULT} else {}


def _named_precisions(constants: SiteConstants) -> dict[str, list[str] | list[float]]:
    """The precisions and what they need, where a head does not compute in its own."""
    if "fp8" not in constants.precision:
        return {}
    return {"precision": list(constants.precision), "fp8_constants": list(constants.fp8_constants)}


def _four_d(build: NodeBuilder, node: fx.Node, rank: int) -> fx.Node:
    """The node as ``[batch, heads, length, head_dim]``: what :meth:`AttentionSite.canonical` does to a tensor."""
    if rank == 2:
        node = build.call(aten.unsqueeze.default, (node, 0))
    if rank < 4:
        return build.call(aten.unsqueeze.default, (node, 1 if rank == 3 else 0))
    return node if rank == 4 else build.call(aten.flatten.using_ints, (node, 0, rank - 4))
