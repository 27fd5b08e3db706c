"""Calls of every shape and dtype that a site has: what it says of them, and that they compute the same."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.passes.find import find

sdpa = F.scaled_dot_product_attention


def x(*shape, dtype=torch.float32):
    return torch.randn(shape or (2, 4, 24, 16)).to(dtype)


CROSS = {
    "more keys": (False, (2, 4, 24, 16), (2, 4, 40, 16)),
    "fewer keys": (False, (2, 4, 24, 16), (2, 4, 7, 16)),
    "causal from the first key": (True, (2, 4, 24, 16), (2, 4, 40, 16)),
    "causal, fewer keys": (True, (2, 4, 24, 16), (2, 4, 20, 16)),
    "three dimensions": (True, (3, 24, 16), (3, 40, 16)),
    "two dimensions": (False, (24, 16), (40, 16)),
}


@pytest.mark.parametrize(("causal", "q_shape", "k_shape"), CROSS.values(), ids=CROSS.keys())
def test_two_lengths(same, causal, q_shape, k_shape):
    site = same(lambda q, k, v: sdpa(q, k, v, is_causal=causal), x(*q_shape), x(*k_shape), x(*k_shape)).site
    assert (site.q_len, site.k_len) == (24, k_shape[-2])
    assert (site.mask, site.valid, site.attn_mask) == (Causal() if causal else Full(), None, None)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (8, 8), (24, 16), (16, 40), (300, 300), (512, 24)])
def test_head_sizes(same, dim, value_dim):
    """MLA's values are narrower than its keys."""
    site = same(lambda q, v: sdpa(q, q, v, is_causal=True), x(2, 4, 24, dim), x(2, 4, 24, value_dim)).site
    assert (site.head_dim, site.value_dim) == (dim, value_dim)
    assert site.scale == dim**-0.5


@pytest.mark.parametrize("shape", [(24, 8), (2, 24, 8)])
def test_a_head_size_of_v_in_other_ranks(same, shape):
    assert same(lambda q, v: sdpa(q, q, v), x(*shape), x(*shape[:-1], 20)).site.value_dim == 20


def in_bfloat16(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return sdpa(q, k, v, is_causal=True)


def masked_in_bfloat16(q, k, v, mask):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return sdpa(q, k, v, attn_mask=mask)


def test_autocast(same):
    found = same(in_bfloat16, x(), x(), x())
    assert found.site.dtype == torch.bfloat16
    with torch.no_grad():
        assert found.call(x(), x(), x()).dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [x(24, 24), x(24, 24) > 0], ids=["bias", "bool"])
def test_autocast_with_a_mask(same, mask):
    site = same(masked_in_bfloat16, x(), x(), x(), mask, close={"atol": 0.01, "rtol": 0.01}).site
    assert (site.dtype, site.attn_mask is not None) == (torch.bfloat16, True)


MASKS = {
    "rows and keys": x(24, 40) > -0.5,
    "bias": x(24, 40),
    "heads": x(4, 24, 40),
    "batch": x(2, 1, 24, 40),
    "batch and heads": x(2, 4, 24, 40) > 0,
    "one row for all": x(4, 1, 40),
    "one key for all": x(24, 1),
    "-inf": x(24, 40).masked_fill(x(24, 40) > 1, float("-inf")),
    "rows that see nothing": (x(24, 40) > 0) & (torch.arange(24) > 5)[:, None],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_dense_mask_from_outside(same, mask):
    site = same(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), x(), x(2, 4, 40, 16), x(2, 4, 40, 16), mask).site
    assert (site.mask, site.valid) == (Full(), None)
    assert site.attn_mask.target == "L_m_"


@pytest.mark.parametrize("shape", [(1, 40), (1, 1, 40), (2, 1, 1, 40)])
def test_a_row_of_valid_keys_from_outside(same, shape):
    mask = x(*shape) > -0.5
    site = same(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), x(), x(2, 4, 40, 16), x(2, 4, 40, 16), mask).site
    assert (site.mask, site.attn_mask) == (Full(), None)
    assert site.valid.target == "L_m_"


@pytest.mark.parametrize(
    ("rank", "shape"),
    [(2, (24, 24)), (2, (1, 24)), (3, (3, 24, 24)), (3, (1, 24)), (5, (2, 3, 1, 24, 24)), (5, (1, 4, 24, 24)),
     (5, (24,))],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_masks_in_other_ranks(same, rank, shape, bias):
    mask = x(*shape) if bias else x(*shape) > -0.5
    q, k, v = (x(*(2, 3, 4, 24, 16)[5 - rank :]) if rank != 3 else x(3, 24, 16) for _ in range(3))
    same(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), q, k, v, mask).site  # noqa: B018 it checks itself


def test_a_short_call_with_a_mask_says_so_first(look):
    mask = torch.ones(24, 24, dtype=torch.bool)
    reason = look(lambda q, m: sdpa(q, q, q, attn_mask=m), x(), mask, min_length=100).reason
    assert reason.startswith("too short: 24 tokens")


@pytest.mark.parametrize("k_len", [32, 24])
def test_exported_lengths_that_may_differ(k_len):
    class Cross(torch.nn.Module):
        def forward(self, q, k):
            return sdpa(q, k, k)

    lengths = {"q": {2: torch.export.Dim("a", min=2)}, "k": {2: torch.export.Dim("b", min=2)}}
    exported = torch.export.export(Cross(), (x(), x(2, 4, k_len, 16)), dynamic_shapes=lengths)
    (site,), refusals = find(exported.module(), min_length=1)
    assert (site.mask, refusals) == (Full(), [])
    assert isinstance(site.q_len, torch.SymInt)
    assert str(site.q_len) != str(site.k_len)


def test_one_graph_serves_two_lengths_that_are_equal_by_chance(compile_with):
    found = compile_with(lambda q, k: sdpa(q, k, k), dynamic=True, change=True)
    with torch.no_grad():
        for q_len, k_len in ((24, 32), (24, 40), (32, 32), (40, 40)):
            q, k = x(2, 4, q_len, 16), x(2, 4, k_len, 16)
            torch.testing.assert_close(found.call(q, k), sdpa(q, k, k))
    assert [len(sites) for sites in found.sites] == [1]


def test_decoding_is_a_graph_of_its_own(compile_with):
    """The guard on the rows: a graph that was made for many of them must not serve one."""
    found = compile_with(lambda q, k: sdpa(q, k, k), dynamic=True, change=True)
    with torch.no_grad():
        for q_len in (24, 8, 16, 15, 30):
            q, k = x(2, 4, q_len, 16), x(2, 4, 40, 16)
            torch.testing.assert_close(found.call(q, k), sdpa(q, k, k))
    assert [len(sites) for sites in found.sites] == [1, 0]
    assert found.reason.startswith("decoding: 8 query rows against 40 keys")
