"""Replace attention calls: by ``afbs::sparse_attention`` with each head's constants written into the call or, in a
graph that several blocks share, by ``afbs::shared_attention``, which is told them when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from afbs_compile.files import write_whole
from afbs_compile.kernels.call import KEEP_ALL, SparseCall
from afbs_compile.kernels.op import arguments_of
from afbs_compile.passes.build import NodeBuilder, erase_unused
from afbs_compile.passes.effects import value_of
from afbs_compile.passes.site import AttentionSite
from afbs_compile.passes.unmask import has_mask_of_valid_keys, unmask

aten = torch.ops.aten


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


def rewrite(
    gm: fx.GraphModule,
    calls: Mapping[AttentionSite, SparseCall],
    unmasked: Sequence[AttentionSite] = (),
    *,
    with_constants: bool = True,
) -> Rewrite:
    """Replace the planned sites of a graph, in place, and erase what only they used.

    Only pure nodes are erased, and only those that lose their last user here: whatever draws random numbers, writes
    into a tensor or has another effect stays, used or not.

    Args:
        gm: the graph in which ``find`` found the sites.
        calls: constants of each site to replace; other calls stay as they are.
        unmasked: other sites, whose mask :func:`afbs_compile.passes.unmask.unmask` drops, or which the operator
            computes densely, with valid keys for a mask.
        with_constants: whether they are written into the graph; else ``afbs::shared_attention`` is told them when it
            runs, by the number of the call in ``calls``.

    Raises:
        ValueError: a site's constants do not match its heads; the graph is then unchanged.
    """
    for site, call in calls.items():
        if call.heads != site.heads:
            raise ValueError(f"{site.name}: {call.heads} values of tau for {site.heads} heads")
    before = _text(gm)
    if not calls and not unmasked:
        return Rewrite(0, before, before)
    here: dict[fx.Node, fx.Node] = {}
    for number, (site, call) in enumerate(calls.items()):
        if with_constants:
            here[site.node] = _replace_by_call(gm, site, call, here)
        else:
            here[site.node] = _replace_by_number(gm, site, number, here)
    by_operator = [site for site in unmasked if has_mask_of_valid_keys(site)]
    for site in by_operator:
        here[site.node] = _replace_by_call(gm, site, SparseCall.uniform(site.heads, KEEP_ALL), here)
    unmask(gm, [site for site in unmasked if site not in by_operator])
    gm.graph.lint()
    gm.recompile()
    return Rewrite(len(calls), before, _text(gm))


def rewrite_shared(gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> Rewrite:
    """Replace sites of a graph that several blocks run by ``afbs::shared_attention``, in place; constants come later.

    Args:
        gm: the graph in which ``find`` found the sites; sites: in the order of their numbers.
    """
    before = _text(gm)
    here: dict[fx.Node, fx.Node] = {}
    for number, site in enumerate(sites):
        here[site.node] = _replace_by_number(gm, site, number, here)
    gm.graph.lint()
    gm.recompile()
    return Rewrite(len(sites), before, _text(gm))


def dump(rewrite: Rewrite, folder: str | os.PathLike[str], name: str) -> None:
    """Write ``<name>.before.py`` and ``<name>.after.py``; a reader never sees half a file.

    Args:
        rewrite: result of :func:`rewrite`.
        folder: created where it is missing.
        name: stem of the two files.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for suffix, text in (("before", rewrite.before), ("after", rewrite.after)):
        write_whole(Path(folder) / f"{name}.{suffix}.py", text)


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _replace_by_call(
    gm: fx.GraphModule, site: AttentionSite, call: SparseCall, here: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    arguments = arguments_of(call.rounded(), site.mask, site.scale)
    return _replace(gm, site, torch.ops.afbs.sparse_attention.default, arguments, here)


def _replace_by_number(
    gm: fx.GraphModule, site: AttentionSite, number: int, here: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    arguments = {"call": number, "mask": str(site.mask), "scale": site.scale}
    return _replace(gm, site, torch.ops.afbs.shared_attention.default, arguments, here)


def _replace(
    gm: fx.GraphModule,
    site: AttentionSite,
    operator: OpOverload,
    arguments: Mapping[str, Any],
    here: Mapping[fx.Node, fx.Node],
) -> fx.Node:
    """Rewrite one site; what stands for its node from now on.

    Args:
        operator: that takes its place; arguments: of it, beside the operands.
        here: what stands for the nodes that were rewritten before, for one of them may be an operand.
    """
    operands = site.node.all_input_nodes
    build = NodeBuilder(site.node)
    q, k, v = (_in_dtype(build, here.get(node, node), site.dtype) for node in (site.q, site.k, site.v))
    sparse = build.call(
        operator,
        tuple(_four_d(build, node, site.rank) for node in (q, k, v)),
        {**arguments, **_extras(build, site, here)},
    )
    if site.rank < 4:
        sparse = build.call(aten.squeeze.dims, (sparse, [1] if site.rank == 3 else [0, 1]))
    elif site.rank > 4:  # the output has the shape of q: a rule says so
        sparse = build.call(aten.reshape_as.default, (sparse, q))
    result = build.in_layout_of(site.node, sparse)
    site.node.replace_all_uses_with(result)
    gm.graph.erase_node(site.node)
    erase_unused(gm.graph, operands)
    return result


def _extras(build: NodeBuilder, site: AttentionSite, here: Mapping[fx.Node, fx.Node]) -> dict[str, Any]:
    """What the operator is told beside q, k, v, the formula and the constants."""
    valid, attn_mask, sinks = (
        None if node is None else here.get(node, node) for node in (site.valid, site.attn_mask, site.sinks)
    )
    given: dict[str, Any] = {"softcap": site.softcap} if site.softcap else {}
    if valid is not None:
        rank = value_of(valid).dim()
        given["valid"] = build.call(aten.flatten.using_ints, (valid, 0, -2)) if rank > 1 else _leading(build, valid, 1)
    if attn_mask is not None:
        mask = attn_mask if value_of(attn_mask).dtype == torch.bool else _in_dtype(build, attn_mask, site.dtype)
        given["attn_mask"] = _mask_in_four_d(build, mask, site.rank)
    if sinks is not None:
        given["sinks"] = sinks
    return given


def _in_dtype(build: NodeBuilder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if value_of(node).dtype == dtype else build.call(aten.to.dtype, (node, dtype))


def _leading(build: NodeBuilder, node: fx.Node, count: int) -> fx.Node:
    """The node with so many dimensions of one element before its own."""
    for _ in range(count):
        node = build.call(aten.unsqueeze.default, (node, 0))
    return node


def _mask_in_four_d(build: NodeBuilder, node: fx.Node, rank: int) -> fx.Node:
    """What :func:`afbs_compile.passes.site.as_attn_mask` does to a tensor, but for the last dimension."""
    node = _leading(build, node, max(rank, 2) - value_of(node).dim())
    if rank < 4:
        return build.call(aten.unsqueeze.default, (node, 1)) if rank == 3 else _leading(build, node, 2)
    return node if rank == 4 else build.call(aten.flatten.using_ints, (node, 0, rank - 4))


def _four_d(build: NodeBuilder, node: fx.Node, rank: int) -> fx.Node:
    """The node as ``[batch, heads, length, head_dim]``: what :meth:`AttentionSite.canonical` does to a tensor."""
    if rank == 2:
        node = build.call(aten.unsqueeze.default, (node, 0))
    if rank < 4:
        return build.call(aten.unsqueeze.default, (node, 1 if rank == 3 else 0))
    return node if rank == 4 else build.call(aten.flatten.using_ints, (node, 0, rank - 4))
