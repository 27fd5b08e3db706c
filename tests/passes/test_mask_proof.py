"""Dense masks: which are proven to be formulas, and that nothing else is: it is read when the graph runs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Around, Chunk, Window
from afbs_compile.passes.constants import ConstantTensors, NotConstantError, run
from afbs_compile.passes.find import find
from afbs_compile.passes.operands import Call

N = 24
sdpa = F.scaled_dot_product_attention


def inplace_on_a_view():
    mask = torch.ones(N, N, dtype=torch.bool)
    for row in range(N):
        mask[row][row + 1 :] = False
    return mask


def written_after_a_use():
    mask = torch.ones(N, N, dtype=torch.bool)
    mask.logical_and_(torch.ones(N, N).tril() > 0)
    return mask


def by_vmap():
    rows = torch.arange(N)
    return torch.vmap(torch.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(rows, rows)


def by_setitem():
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[torch.tril_indices(N, N)[0], torch.tril_indices(N, N)[1]] = True
    return mask


CAUSAL = {
    "tril": lambda: torch.ones(N, N, dtype=torch.bool).tril(),
    "arange": lambda: torch.arange(N)[:, None] >= torch.arange(N),
    "2-D and more": lambda: (torch.arange(N)[:, None] >= torch.arange(N))[None, None],
    "per batch": lambda: torch.ones(2, 1, N, N, dtype=torch.bool).tril(),
    "per head": lambda: torch.ones(2, 4, N, N, dtype=torch.bool).tril(),
    "expanded": lambda: torch.ones(N, N, dtype=torch.bool).tril().expand(2, 4, N, N),
    "triu, negated": lambda: ~torch.ones(N, N).triu(1).bool(),
    "and of constants": lambda: torch.ones(N, N, dtype=torch.bool) & (torch.arange(N)[:, None] >= torch.arange(N)),
    "to the device": lambda: torch.full((N, N), True).tril().to("cpu"),
    "in place": lambda: torch.ones(N, N, dtype=torch.bool).tril_(),
    "in place on views": inplace_on_a_view,
    "in place, old name": written_after_a_use,
    "by setitem": by_setitem,
    "by vmap": by_vmap,
    "filled memory": lambda: torch.empty(N, N, dtype=torch.bool).fill_(True).tril(),
    "added -inf": lambda: torch.full((N, N), float("-inf")).triu(1),
    "added lowest number": lambda: torch.full((N, N), torch.finfo(torch.float32).min).triu(1),
    "where with literals": lambda: torch.where(
        torch.ones(N, N).tril() > 0, torch.tensor(0.0), torch.tensor(float("-inf"))
    ),
}


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL.keys())
def test_causal(look, qkv, make):
    assert look(lambda q, k, v: sdpa(q, k, v, attn_mask=make()), *qkv).site.mask == Causal()


ALL_TRUE = {
    "square": lambda: torch.ones(N, N, dtype=torch.bool),
    "broadcast rows": lambda: torch.ones(2, 1, 1, N, dtype=torch.bool),
}


@pytest.mark.parametrize("make", ALL_TRUE.values(), ids=ALL_TRUE.keys())
def test_all_true_is_full_attention(look, qkv, make):
    assert look(lambda q, k, v: sdpa(q, k, v, attn_mask=make()), *qkv).site.mask == Full()


def flipped(row, column):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[row, column] = ~mask[row, column]
    return mask


def cut_off(length):
    mask = torch.arange(N)[:, None] >= torch.arange(N)
    mask[:, : N - length] = False
    return mask


FORMULAS = {
    "sliding window": (lambda: torch.ones(N, N, dtype=torch.bool).tril().triu(-8), Window(9)),
    "chunks": (lambda: (torch.arange(N)[:, None] // 7 == torch.arange(N) // 7).tril(), Chunk(7)),
    "shifted by one": (lambda: torch.ones(N, N, dtype=torch.bool).tril(1), Around(N - 1, 1)),
    "anti-causal": (lambda: torch.ones(N, N, dtype=torch.bool).triu(), Around(0, N - 1)),
    "both ways": (lambda: torch.ones(N, N).tril(3).triu(-5) > 0, Around(5, 3)),
    "zeros that are added": (lambda: torch.zeros(N, N), Full()),
    "an added window": (lambda: torch.full((N, N), float("-inf")).triu(1) + lowest_before(4), Window(5)),
    "of a sum": (lambda: torch.ones(2, 1, N, N).cumsum(-1).tril() > 0, Causal()),
}


def lowest_before(width):
    return torch.zeros(N, N).masked_fill(torch.ones(N, N).tril(-width - 1) > 0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(("make", "mask"), FORMULAS.values(), ids=FORMULAS.keys())
def test_another_formula(same, qkv, make, mask):
    site = same(lambda q, k, v: sdpa(q, k, v, attn_mask=make()), *qkv).site
    assert (site.mask, site.valid, site.attn_mask) == (mask, None, None)


BEHIND_A_CACHE = {
    "aligned at the end": (lambda: torch.ones(N, N + 8, dtype=torch.bool).tril(8), CausalEnd()),
    "aligned at the start": (lambda: torch.ones(N, N + 8, dtype=torch.bool).tril(), Causal()),
    "window": (lambda: torch.ones(N, N + 8, dtype=torch.bool).tril(8).triu(4), Window(5)),
    "full": (lambda: torch.ones(N, N + 8, dtype=torch.bool), Full()),
    "aligned nowhere": (lambda: torch.ones(N, N + 8, dtype=torch.bool).tril(4), None),
}


@pytest.mark.parametrize(("make", "mask"), BEHIND_A_CACHE.values(), ids=BEHIND_A_CACHE.keys())
def test_more_keys_than_rows(same, qkv, make, mask):
    k, v = (torch.randn(2, 4, N + 8, 16) for _ in range(2))
    site = same(lambda q, k, v: sdpa(q, k, v, attn_mask=make()), qkv[0], k, v).site
    assert (site.mask, site.attn_mask is None) == (mask or Full(), mask is not None)


OTHER = {
    "one bit of the past": lambda: flipped(20, 3),
    "one bit of the future": lambda: flipped(3, 20),
    "the last bit": lambda: flipped(N - 1, N - 1),
    "the first bit": lambda: flipped(0, 0),
    "strict": lambda: torch.ones(N, N, dtype=torch.bool).tril(-1),
    "last keys only": lambda: cut_off(4),
    "one head of eight": lambda: torch.stack([torch.ones(N, N).tril() > 0] * 7 + [torch.ones(N, N) > 0]).view(
        2, 4, N, N
    ),
    "keys hidden everywhere": lambda: (torch.arange(N) < N - 1)[None, None, None],
    "written after tril": lambda: torch.ones(N, N, dtype=torch.bool).tril().logical_not_(),
    "one window of two heads": lambda: torch.stack([torch.ones(N, N).tril().triu(-w) > 0 for w in (8, 8, 8, 7)]),
}


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER.keys())
def test_another_pattern_is_read_when_the_graph_runs(same, qkv, make):
    site = same(lambda q, k, v: sdpa(q, k, v, attn_mask=make()), *qkv).site
    assert (site.mask, site.valid) == (Full(), None)
    assert site.attn_mask is not None


@pytest.mark.parametrize("value", [1.0, -1e30, float("nan"), float("inf")])
def test_another_number_in_a_floating_mask_is_a_bias(same, qkv, value):
    site = same(lambda q, k, v: sdpa(q, k, v, attn_mask=torch.full((N, N), value).triu(1)), *qkv).site
    assert (site.mask, site.valid, site.attn_mask is not None) == (Full(), None, True)


class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(N, N, dtype=torch.bool).tril())
        self.plain = torch.ones(N, N, dtype=torch.bool).tril()
        self.weight = torch.nn.Parameter(torch.ones(N, N).tril())


GLOBAL = torch.ones(N, N, dtype=torch.bool).tril()


@torch._dynamo.allow_in_graph
def opaque(mask):
    return mask.tril()


def keep_lower_triangle(mask):
    return mask.tril()


torch.library.custom_op("afbs_test::lower", keep_lower_triangle, mutates_args=(), schema="(Tensor mask) -> Tensor")
torch.library.register_fake("afbs_test::lower", torch.empty_like)


def random_but_causal():
    return (torch.rand(N, N) >= 0) & (torch.ones(N, N).tril() > 0)


UNSAFE = {
    "a buffer": (lambda m, q: m.mask, "mask_"),
    "an attribute": (lambda m, q: m.plain, "plain"),
    "a parameter": (lambda m, q: m.weight > 0, "weight"),
    "a global": (lambda m, q: GLOBAL, "GLOBAL"),
    "an input's values": (lambda m, q: (q[0, 0, :, :1] > -99) & (torch.ones(N, N).tril() > 0), "L_q_"),
    "random numbers": (lambda m, q: random_but_causal(), "random"),
    "dropout": (lambda m, q: F.dropout(torch.ones(N, N), 0.5, True) >= 0, "random"),
    "bits that were random": (lambda m, q: torch.ones(N, N).bernoulli_(1.0).tril() > 0, "random"),
    "uninitialised memory": (lambda m, q: torch.empty(N, N).tril() == 0, "uninitialised"),
    "half filled memory": (lambda m, q: half_filled(), "uninitialised"),
    "a foreign function": (lambda m, q: opaque(torch.ones(N, N) > 0), "looked into"),
    "an operator of someone's": (lambda m, q: torch.ops.afbs_test.lower(torch.ones(N, N)) > 0, "afbs_test"),
    "an input written in": (lambda m, q: overwritten(q), "L_q_"),
    "an input written into a view": (lambda m, q: overwritten_view(q), "L_q_"),
    "an input by out=": (lambda m, q: overwritten_out(q), "L_q_"),
}


def half_filled():
    mask = torch.empty(N, N, dtype=torch.bool)
    mask[: N // 2].fill_(True)
    return mask.tril()


def overwritten(q):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[0, 0] = q[0, 0, 0, 0] > -99
    return mask


def overwritten_view(q):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask.view(-1).select(0, 0).logical_and_(q[0, 0, 0, 0] > -99)
    return mask


def overwritten_out(q):
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    torch.logical_and(mask, q[0, 0, :, :1] > -99, out=mask)
    return mask


def masked(make):
    module = Buffered()
    module.forward = lambda q, k, v: sdpa(q, k, v, attn_mask=make(module, q))
    return module


@pytest.mark.parametrize(("make", "why"), UNSAFE.values(), ids=UNSAFE.keys())
def test_what_may_change_between_calls_is_no_constant(look, qkv, make, why):
    found = look(masked(make), *qkv)
    assert found.site.attn_mask is not None
    constants, mask = ConstantTensors(found.graphs[0]), Call.of(found.site.node).mask
    with pytest.raises(NotConstantError, match=why):
        run(constants.program(mask, before=found.site.node), mask)


UNINITIALISED = ("uninitialised memory", "half filled memory")


@pytest.mark.parametrize("name", [name for name in UNSAFE if name not in UNINITIALISED])
def test_what_may_change_between_calls_is_read_in_each(same, qkv, name):
    same(masked(UNSAFE[name][0]), *qkv)


@pytest.mark.parametrize("name", ["mask", "plain", "weight"])
def test_a_mask_of_the_module_that_changes_is_followed(compile_with, qkv, name):
    module = masked(lambda m, q: getattr(m, name) > 0)
    found = compile_with(module, change=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(found.call(*qkv), module(*qkv))
            getattr(module, name)[5:9, :3] = 0
    assert len(found.graphs) == 1


def test_a_part_that_is_constant_is_still_a_formula(same, qkv):
    site = same(masked(UNSAFE["an input's values"][0]), *qkv).site
    assert (site.mask, site.valid, site.attn_mask is not None) == (Causal(), None, True)


def test_random_numbers_are_not_drawn_by_the_attempt(look, qkv):
    (gm,) = look(lambda q, k, v: sdpa(q, k, v, attn_mask=random_but_causal()), *qkv).graphs
    state = torch.random.get_rng_state()
    (site,) = find(gm, min_length=1)[0]
    assert site.attn_mask is not None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_mask_written_between_two_calls_is_judged_twice(same, qkv):
    def fn(q, k, v):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        first = sdpa(q, k, v, attn_mask=mask)
        mask.fill_(True)
        second = sdpa(first, k, v, attn_mask=mask)
        mask[0, 0] = False
        return sdpa(second, k, v, attn_mask=mask)

    (sites,) = same(fn, *qkv).sites
    assert [site.mask for site in sites] == [Causal(), Full(), Full()]
    assert [site.attn_mask is not None for site in sites] == [False, False, True]


def test_writes_to_other_tensors_do_not_matter(look, qkv):
    def fn(q, k, v):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        q = q * 2
        q += 1
        v[0] = 0
        return sdpa(q.mul_(2), k, v, attn_mask=mask)

    assert look(fn, *qkv).site.mask == Causal()


def test_only_the_shape_of_an_input_enters(look, qkv):
    def fn(q, k, v):
        mask = torch.ones_like(q[0, 0, :, :1]) * q.new_ones(N, N)
        return sdpa(q, k, v, attn_mask=mask.tril() > 0)

    assert look(fn, *qkv).site.mask == Causal()


def test_an_operator_that_only_reads_the_mask_does_not_matter(look, qkv):
    def fn(q, k, v):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        q = checkpoint(lambda q, mask: q * mask.sum(), q, mask, use_reentrant=False)
        return sdpa(q, k, v, attn_mask=mask)

    assert look(fn, *qkv).site.mask == Causal()
