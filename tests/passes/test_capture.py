"""Operands of every site, without touching the graph's inputs, the random state or more memory than one site's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.passes.capture import SampleRun, capture
from afbs_compile.passes.find import find
from tests.toy import HEAD_DIM, HEADS, Toy, drifting


def graph_of(function, *inputs):
    """The graph Dynamo captures, and its placeholder values."""
    seen = []

    def keep(gm, example_inputs):
        seen.append((gm, example_inputs))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return seen[0]


def run_of(function, *inputs):
    gm, values = graph_of(function, *inputs)
    return SampleRun(gm, find(gm, min_length=1)[0], values)


@pytest.fixture
def seen_by_sdpa(monkeypatch):
    """What eager SDPA calls receive."""
    calls = []
    original = F.scaled_dot_product_attention

    def spy(q, k, v, **keywords):
        calls.append((q, k, v))
        return original(q, k, v, **keywords)

    return calls, lambda: monkeypatch.setattr(F, "scaled_dot_product_attention", spy)


@torch.no_grad()
def test_operands_are_what_the_model_computes(seen_by_sdpa):
    model, x = Toy().eval(), drifting(256)
    run = run_of(model, x)
    calls, spy = seen_by_sdpa
    spy()
    model(x)
    for (q, k, v), (name, (operands,)) in zip(calls, capture([run]), strict=True):
        assert name.startswith("layers.")
        assert operands.q.shape == (1, HEADS, 256, HEAD_DIM)
        assert (operands.mask, operands.scale) == (Causal(), pytest.approx(HEAD_DIM**-0.5))
        for captured, eager in ((operands.q, q), (operands.k, k), (operands.v, v)):
            torch.testing.assert_close(captured, eager)


def test_samples_walk_side_by_side():
    model = Toy().eval()
    gm, values = graph_of(model, drifting(256))
    sites = find(gm, min_length=1)[0]
    position = next(i for i, value in enumerate(values) if value.shape == (1, 256, 128))
    inputs = []
    for seed in (0, 1):
        row = list(values)
        row[position] = drifting(256, seed=seed)
        inputs.append(row)
    together = {name: list(ops) for name, ops in capture([SampleRun(gm, sites, row) for row in inputs])}
    for index, row in enumerate(inputs):
        for name, (alone,) in capture([SampleRun(gm, sites, row)]):
            torch.testing.assert_close(together[name][index].q, alone.q)


def test_inputs_and_random_state_are_untouched():
    def write_and_draw(cache, x):
        cache.index_copy_(2, torch.arange(64), x)
        return F.scaled_dot_product_attention(cache, cache, cache + torch.rand_like(cache), is_causal=True)

    cache, x = torch.zeros(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    gm, values = graph_of(write_and_draw, torch.zeros_like(cache), x)
    values = [cache if value.shape == cache.shape and not value.eq(x).all() else value for value in values]
    state = torch.get_rng_state()
    ((_, (operands,)),) = [
        (name, list(ops)) for name, ops in capture([SampleRun(gm, find(gm, min_length=1)[0], values)])
    ]
    assert torch.equal(operands.k, x)
    assert not cache.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_repeated_kv_heads_are_captured_once():
    def grouped(q, k):
        wide = k[:, :, None].expand(1, 2, 2, 128, 16).reshape(1, 4, 128, 16)
        return F.scaled_dot_product_attention(q, wide, wide, is_causal=True)

    q, k = torch.randn(1, 4, 128, 16), torch.randn(1, 2, 128, 16)
    ((_, (operands,)),) = [(name, list(ops)) for name, ops in capture([run_of(grouped, q, k)])]
    assert torch.equal(operands.k, k)


@pytest.mark.parametrize("shape", [(3, 128, 16), (128, 16), (2, 3, 4, 128, 16)], ids=str)
def test_other_ranks_come_in_canonical_form(shape):
    x = torch.randn(shape)
    run = run_of(lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True), x)
    ((_, (operands,)),) = [(name, list(ops)) for name, ops in capture([run])]
    heads = shape[-3] if len(shape) > 3 else 1
    assert torch.equal(operands.q, x.reshape(-1, heads, 128, 16))


def test_one_site_is_alive_at_a_time():
    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(4):
                x = F.scaled_dot_product_attention(x.sin(), x.cos(), x.exp(), is_causal=True)
            return x

    earlier = []
    for _, operands in capture([run_of(Deep(), torch.randn(1, 2, 128, 16))]):
        gc.collect()
        assert not any(ref() is not None for ref in earlier)
        earlier += [weakref.ref(tensor) for sample in operands for tensor in (sample.q, sample.k, sample.v)]


def test_autocast_in_the_graph_reaches_neither_the_consumer_nor_the_other_sample():
    def mixed(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.scaled_dot_product_attention(x @ x.mT @ x, x, x, is_causal=True)
            return F.scaled_dot_product_attention((y @ x.mT.to(y.dtype)) @ x.to(y.dtype), y, y, is_causal=True)

    run = run_of(mixed, torch.randn(1, 2, 64, 16))
    if not run.sites:
        pytest.skip("autocast made the operands' dtypes differ: refused")
    for _, operands in capture([run, run]):
        assert not torch.is_autocast_enabled("cpu")
        torch.testing.assert_close(operands[0].q, operands[1].q, rtol=0, atol=0)


def test_runs_with_other_sites_are_refused():
    one = run_of(lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True), torch.randn(1, 2, 64, 16))
    two = run_of(Toy().eval(), drifting(128))
    with pytest.raises(ValueError, match="same attention sites"):
        list(capture([one, two]))
