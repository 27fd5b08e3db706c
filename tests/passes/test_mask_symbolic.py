"""Masks of exported graphs with a free length: the answer must hold at every length, not at the example's."""

import pytest
import torch
import torch.nn.functional as F

from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Around, Window
from afbs_compile.passes.find import find
from afbs_compile.passes.mask_proof import classify

LOWEST = torch.finfo(torch.float32).min
INF = float("inf")
arange = torch.arange


def rows(n):
    return arange(n)[:, None]


def packed(n):
    """How transformers looks for packed sequences in the positions: it finds none in ``arange``."""
    positions = arange(n).unsqueeze(0)
    jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    sequence = jumps.cumsum(-1)
    batch, row, key = arange(1)[:, None, None], rows(n)[None], arange(n)[None, None]
    return (sequence[batch, row] == sequence[batch, key]) & (positions[batch, key] <= positions[batch, row])


CAUSAL = {
    "compared": lambda n: rows(n) >= arange(n),
    "strictly": lambda n: arange(n) < rows(n) + 1,
    "negated": lambda n: ~(arange(n) > rows(n)),
    "backwards": lambda n: (n - 1 - rows(n)) <= (n - 1 - arange(n)),
    "tril": lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    "triu": lambda n: torch.logical_not(torch.ones(n, n, dtype=torch.bool).triu(1)),
    "transposed": lambda n: (rows(n) <= arange(n)).transpose(0, 1),
    "both of two": lambda n: (rows(n) >= arange(n)) & (rows(n) + 5 >= arange(n)),
    "one of two": lambda n: (rows(n) >= arange(n)) | (rows(n) - 5 >= arange(n)),
    "offset cancels": lambda n: (rows(n) + n)[:, :] >= arange(n, 2 * n),
    "packed": packed,
    "four dimensions": lambda n: (rows(n) >= arange(n))[None, None].expand(1, 1, n, n),
    "-inf": lambda n: torch.full((n, n), -INF).triu(1),
    "lowest": lambda n: torch.zeros(n, n).masked_fill(rows(n) < arange(n), LOWEST),
    "where": lambda n: torch.where(rows(n) >= arange(n), 0.0, -INF),
    "filled": lambda n: torch.ones(n, n, dtype=torch.bool).masked_fill(rows(n) < arange(n), False),
}
WINDOWS = {
    "window": (lambda n: (rows(n) >= arange(n)) & (rows(n) - arange(n) < 32), Window(32)),
    "window of one": (lambda n: rows(n) == arange(n), Window(1)),
    "triangles": (lambda n: torch.ones(n, n, dtype=torch.bool).tril().triu(-4), Window(5)),
    "both ways": (lambda n: (rows(n) - arange(n) <= 3) & (arange(n) - rows(n) <= 3), Around(3, 3)),
    "lowest": (lambda n: torch.zeros(n, n).masked_fill((arange(n) > rows(n)) | (arange(n) < rows(n) - 6), LOWEST),
               Window(7)),
}  # fmt: skip
NEITHER = {
    "one key of the future": lambda n: torch.ones(n, n, dtype=torch.bool).tril(1),
    "without itself": lambda n: rows(n) > arange(n),
    "a distant key of the future": lambda n: (rows(n) >= arange(n)) | (rows(n) + 100 == arange(n)),
    "the first token is seen by all": lambda n: (rows(n) >= arange(n)) | (arange(n) == 7),
    "from the end": lambda n: (n - 1 - rows(n)) <= arange(n),
    "twice as fast": lambda n: 2 * rows(n) >= arange(n),
    "shifted by the length": lambda n: rows(n) >= arange(n) - n,
    "empty": lambda n: torch.zeros(n, n, dtype=torch.bool),
    "a bias": lambda n: torch.full((n, n), -1.0).triu(1),
    "a bias in the past": lambda n: torch.where(rows(n) >= arange(n), 1.0, -INF),
    "a table": lambda n: torch.where(rows(n) >= arange(n), torch.zeros(n), torch.tensor([-INF, 0.0])[:1]),
    "negative indices": lambda n: (arange(n)[arange(n)[:, None] - 1]) + 1 >= arange(n),
    "in place": lambda n: torch.ones(n, n, dtype=torch.bool).tril_(),
    "blocks": lambda n: (rows(n) // 4) >= (arange(n) // 4),
}


def exported(make):
    class Masked(torch.nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=make(q.shape[2]))

    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    return torch.export.export(Masked(), (torch.randn(2, 4, 24, 16),), dynamic_shapes=(free,))


def found(make):
    return find(exported(make).graph_module, min_length=1)


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
def test_causal_at_every_length(make):
    (site,), refusals = found(make)
    assert site.mask == Causal()
    assert refusals == []
    assert isinstance(site.q_len, torch.SymInt)
    for length in (2, 3, 24, 70):
        assert classify(make(length), length, length) == Causal()


@pytest.mark.parametrize(("make", "mask"), WINDOWS.values(), ids=WINDOWS)
def test_a_window_at_every_length(make, mask):
    (site,), _ = found(make)
    assert (site.mask, site.attn_mask) == (mask, None)
    for length in (24, 40, 70):
        assert torch.equal(make(length) == 0 if make(length).is_floating_point() else make(length),
                           mask.matrix(length, length, torch.device("cpu")))  # fmt: skip


@pytest.mark.parametrize("make", NEITHER.values(), ids=NEITHER)
def test_read_when_the_graph_runs_unless_it_holds_at_every_length(make):
    (site,), refusals = found(make)
    assert refusals == []
    assert (site.mask, site.valid) == (Full(), None)
    assert site.attn_mask is not None


BEHIND_A_CACHE = {
    "aligned at the end": (lambda n, m: rows(n) + (m - n) >= arange(m), CausalEnd()),
    "aligned at the start": (lambda n, m: rows(n) >= arange(m), Causal()),
    "window": (lambda n, m: (rows(n) + m - n >= arange(m)) & (rows(n) + m - n < arange(m) + 9), Window(9)),
    "full": (lambda n, m: torch.ones(n, m, dtype=torch.bool), Full()),
    "a window at the start": (lambda n, m: (rows(n) >= arange(m)) & (rows(n) < arange(m) + 9), None),
}


@pytest.mark.parametrize(("make", "mask"), BEHIND_A_CACHE.values(), ids=BEHIND_A_CACHE)
def test_two_lengths(make, mask):
    class Masked(torch.nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, attn_mask=make(q.shape[2], k.shape[2]))

    free = tuple({2: torch.export.Dim(name, min=2, max=4096)} for name in ("rows", "keys"))
    inputs = (torch.randn(2, 4, 24, 16), torch.randn(2, 4, 40, 16))
    (site,), _ = find(torch.export.export(Masked(), inputs, dynamic_shapes=free).graph_module, min_length=1)
    assert (site.mask, site.attn_mask is None) == (mask or Full(), mask is not None)


def test_true_everywhere():
    (site,), _ = found(lambda n: torch.ones(n, n, dtype=torch.bool))
    assert site.mask == Full()


def test_literals():
    """``module()`` keeps them as attributes; in the program's own graph they are inputs like any other."""
    (site,), _ = find(
        exported(lambda n: torch.where(rows(n) >= arange(n), torch.tensor(0.0), torch.tensor(-INF))).module(),
        min_length=1,
    )
    assert site.mask == Causal()


def test_repeated_key_heads_are_found_behind_the_slices_of_an_exported_graph():
    class Model(torch.nn.Module):
        def forward(self, q, k):
            wide = k[:, :, None, :, :].expand(-1, -1, 2, -1, -1).reshape(q.shape)
            return F.scaled_dot_product_attention(q, wide, wide, is_causal=True)

    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    inputs = (torch.randn(2, 4, 24, 16), torch.randn(2, 2, 24, 16))
    exported = torch.export.export(Model(), inputs, dynamic_shapes=(free, free))
    (site,), _ = find(exported.graph_module, min_length=1)
    assert (site.heads, site.kv_heads) == (4, 2)
