"""Drop the mask of attention calls that stay dense, where it was proven to be what ``is_causal=True`` says.

``scaled_dot_product_attention(is_causal=True)`` without a mask computes the same up to rounding, and runs on kernels
that skip the future instead of reading a mask of N x N elements. The proof is the one that a sparse call needs, with
the guards that it left (:mod:`afbs_compile.passes.mask_proof`); nothing is proven here.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from afbs_compile.kernels.attend.machine import reads_freely
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.passes.build import NodeBuilder, erase_unused
from afbs_compile.passes.effects import value_of
from afbs_compile.passes.operands import Call, is_sdpa
from afbs_compile.passes.site import AttentionSite
from afbs_compile.passes.sizes import same_sizes


def has_needless_mask(site: AttentionSite) -> bool:
    """Whether a site has a mask that ``is_causal=True`` replaces; it does not widen the output beyond q's shape either.

    PyTorch's CPU kernels return NaN for ``is_causal=True`` with a scale of 0 or less: there the mask stays.
    """
    by_formula = site.valid is None and site.attn_mask is None
    masked = site.mask == Causal() and by_formula and is_sdpa(site.node) and Call.of(site.node).mask is not None
    scaled = isinstance(site.scale, float) and site.scale > 0
    return masked and scaled and same_sizes(value_of(site.node).shape, value_of(site.q).shape)


def has_mask_of_valid_keys(site: AttentionSite) -> bool:
    """Whether a site's mask is a formula and valid keys, and it can be known for free whether all of them are.

    The operator then computes the dense call, and where all keys are valid it needs no mask.
    """
    return is_sdpa(site.node) and site.valid is not None and site.attn_mask is None and reads_freely(site.device)


def unmask(gm: fx.GraphModule, sites: Iterable[AttentionSite]) -> None:
    """Make sites with a proven causal mask say ``is_causal=True`` instead, in place; their operands stay as they are.

    Args:
        gm: the graph in which ``find`` found the sites; it must be recompiled.
        sites: those for which :func:`has_needless_mask` holds.

    Raises:
        ValueError: it does not hold for one.
    """
    for site in sites:
        if not has_needless_mask(site):
            raise ValueError(f"{site.name}: it has no mask that is proven causal")
        call, build = Call.of(site.node), NodeBuilder(site.node)
        options = {"is_causal": True, "scale": call.scale, "enable_gqa": call.enable_gqa}
        plain = build.call(site.node.target, (call.q, call.k, call.v), options)
        site.node.replace_all_uses_with(build.in_layout_of(site.node, plain))
        gm.graph.erase_node(site.node)
        erase_unused(gm.graph, [call.mask] if call.mask is not None else [])
