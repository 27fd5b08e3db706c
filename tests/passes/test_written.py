"""Attention that models write out in products and a softmax: found by what it computes, the same when rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.passes.effects import function_name
from tests.passes.conftest import Compiled, compiled, keep_everything, select_everything

B, H, N, M, D = 2, 3, 40, 56, 16


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


Q, K, V = tensor(B, H, N, D, seed=1), tensor(B, H, M, D, seed=2), tensor(B, H, M, D + 8, seed=3)
SQUARE = tuple(tensor(B, H, N, D, seed=seed) for seed in (4, 5, 6))
BIAS = tensor(1, H, N, M, seed=7)
SEEN = torch.rand(B, 1, N, M, generator=torch.Generator().manual_seed(8)) > 0.3
SLOPES = tensor(B * H, 1, M, seed=9)
SINKS = tensor(H, seed=10)


def lower(n: int, k: int) -> Tensor:
    return torch.ones(n, k, dtype=torch.bool).tril()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), dim=-1) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.matmul(q * 0.3, k.mT), -1).matmul(v)


def with_dropout_and_casts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax((q @ k.transpose(2, 3)).mul(0.25).float(), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v)


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = BIAS + torch.matmul(q, k.transpose(2, 3)) * 0.25
    return scores.masked_fill(~SEEN, torch.finfo(torch.float32).min).softmax(dim=-1) @ v


def filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores *= 0.25
    scores += BIAS
    scores.masked_fill_(~SEEN, -math.inf)
    return scores.softmax(-1) @ v


def where_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores = scores / torch.full([], D**0.5)
    scores = torch.where(lower(N, N), scores, torch.full([], torch.finfo(torch.float32).min))
    return scores.softmax(-1) @ v


def bias_then_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2) + BIAS) * 0.25, dim=-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM."""
    q, k, v = q.reshape(B * H, N, D), k.reshape(B * H, M, D).transpose(-1, -2), v.reshape(B * H, M, -1)
    scores = SLOPES.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=0.25).view(B, H, N, -1)
    weights = F.softmax(
        scores + torch.where(SEEN, 0.0, torch.finfo(torch.float32).min), dim=-1, dtype=torch.float32
    ).to(q.dtype)
    return torch.bmm(F.dropout(weights, 0.1, False).view(B * H, N, -1), v)


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MVP, with a mask by way of four dimensions."""
    q, k, v = (x.reshape(B * H, -1, x.shape[-1]) for x in (q * 0.25, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, N, M) + torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)
    return torch.bmm(F.softmax(scores.view(B * H, N, M), dim=-1), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    weights = torch.einsum("ibnd,jbnd->bnij", q, k).mul(0.25).softmax(dim=3)
    return torch.einsum("bnij,jbnd->ibnd", weights, v)


def einsum_of_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key head for all query heads."""
    scores = torch.einsum("bgqd,bkd->bgqk", q, k[:, 0]) * 0.25
    return torch.einsum("bgqk,bkd->bgqd", scores.softmax(-1), v[:, 0])


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.view(B, 1, H, N, D), k[:, :1, None], v[:, :1, None]
    return (torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v).flatten(1, 2)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    scores = torch.tanh(scores / 2.0) * 2.0
    return F.softmax(scores + torch.where(SEEN, 0.0, torch.finfo(torch.float32).min), dim=-1, dtype=torch.float32) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt-oss."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)
    scores = torch.cat([scores, SINKS.reshape(1, -1, 1, 1).expand(B, -1, N, -1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1)[..., :-1] @ v


def disentangled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeBERTa: what is added is a product, too."""
    positions = torch.matmul(q, BIAS[0, :, :D, :D].mT).gather(-1, torch.arange(M).remainder(D).expand(B, H, N, M))
    return ((q @ (k.transpose(-1, -2) / 4.0)) + positions).softmax(-1) @ v


def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What softmax does not see: a number added to all scores, a bound that none of them reaches."""
    scores = (q @ k.mT * 0.25 + 0).masked_fill(~SEEN, torch.finfo(q.dtype).min) - 3
    return torch.max(scores, torch.full((), torch.finfo(q.dtype).min)).softmax(-1) @ v


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    call.__name__: (call, SQUARE if call in (where_causal, grouped) else (Q, K, V))
    for call in (
        plain, scaled_before, with_dropout_and_casts, additive, filled_in_place, where_causal, bias_then_scale,
        baddbmm, bmm, einsum, einsum_of_groups, grouped, softcap, sinks, disentangled, shifted,
    )
}  # fmt: skip


def run(name: str, **options: Any) -> tuple[Compiled, Tensor, Tensor]:
    call, operands = CALLS[name]
    found = compiled(call, **options)
    with torch.no_grad():
        return found, found.call(*operands), call(*operands)


@pytest.mark.parametrize("constants", [keep_everything, select_everything], ids=lambda x: x.__name__)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_found_and_computes_the_same(name: str, dynamic: bool, constants: Callable[..., Any]) -> None:
    found, out, expected = run(name, change=True, dynamic=dynamic, call=constants)
    assert found.site.q_len == N
    assert found.rewrites[-1].changed == 1
    left = {function_name(node) for node in found.graphs[-1].graph.nodes}
    assert name == "filled_in_place" or not left & {"softmax", "bmm", "einsum"}
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_that_is_not_rewritten_computes_the_same(name: str) -> None:
    found, out, expected = run(name)
    assert found.site.k_len == (N if name in ("where_causal", "grouped") else M)
    torch.testing.assert_close(out, expected)


def test_what_a_site_says() -> None:
    site = run("where_causal")[0].site
    assert (site.mask, site.attn_mask, site.scale) == (Causal(), None, 0.25)
    assert (site.batch, site.heads, site.head_dim, site.rank) == (B, H, D, 4)
    site = run("baddbmm")[0].site
    assert (site.mask, site.scale, site.batch, site.heads, site.value_dim) == (Full(), 0.25, B, H, D + 8)
    site = run("softcap")[0].site
    assert (site.softcap, site.scale, site.sinks) == (2.0, 0.25, None)
    site = run("sinks")[0].site
    assert (site.softcap, site.scale) == (0.0, 0.25)
    assert site.sinks is not None


def test_an_attention_of_another_ones_output() -> None:
    """The first call's last product is spelled anew, and what stands for it is an operand of the second."""

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(2):
            q = torch.einsum("bnij,bjnd->bind", torch.einsum("bind,bjnd->bnij", q, k).mul(0.25).softmax(-1), v)
        return q

    operands = tuple(x.transpose(1, 2).contiguous() for x in SQUARE)
    found = compiled(twice, change=True, call=select_everything)
    with torch.no_grad():
        torch.testing.assert_close(found.call(*operands), twice(*operands), rtol=1e-4, atol=1e-5)
    assert len(found.sites[-1]) == 2


def test_a_mask_that_is_a_formula_is_proven() -> None:
    def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + BIAS[:, :, :1, :N]
        return (scores + torch.where(lower(N, N), 0.0, torch.finfo(torch.float32).min)).softmax(-1) @ v

    found = compiled(alibi, change=True, call=select_everything)
    with torch.no_grad():
        torch.testing.assert_close(found.call(*SQUARE), alibi(*SQUARE), rtol=1e-4, atol=1e-5)
    assert found.site.mask == Causal()
    assert found.site.attn_mask is not None
    assert tuple(found.site.attn_mask.meta["example_value"].shape) == (1, H, 1, N)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "weights": (
        lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v, w),
        "attention weights used: the graph returns or reads the softmax weights",
    ),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.2) @ v, "dropout in effect: dropout_p=0.2"),
    "decoding": (lambda q, k, v: (q[:, :, :1] @ k.mT).softmax(-1) @ v, "decoding: 1 query rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, sentence = REFUSED[name]
    found = compiled(call)
    with torch.no_grad():
        found.call(Q, K, V)
    assert found.reason.startswith(sentence)


OTHERS: dict[str, Callable[..., Tensor]] = {
    "another softmax": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "routing": lambda q, k, v: k.softmax(-1) @ v.mT[:, :, :D],
    "no product behind it": lambda q, k, v: (BIAS * 2.0).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_computations_are_no_attention(name: str) -> None:
    found = compiled(OTHERS[name])
    with torch.no_grad():
        found.call(Q, K, V)
    assert (found.sites[-1], found.refusals[-1]) == ([], [])


UNREAD: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a nonlinearity": (lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, "its scores pass through 'relu' (relu)"),
    "a mask inside the cap": (
        lambda q, k, v: (torch.tanh(q @ k.mT + BIAS) * 2.0).softmax(-1) @ v,
        "its scale, masks and cap come in an order that no single call has",
    ),
    "a factor a key": (lambda q, k, v: (q @ k.mT * BIAS).softmax(-1) @ v, "its scores pass through 'mul' (mul)"),
    "a fill that hides nothing": (
        lambda q, k, v: (q @ k.mT).masked_fill(~SEEN, 1.0).softmax(-1) @ v,
        "its scores pass through 'masked_fill' (masked_fill)",
    ),
    "k is written into": (
        lambda q, k, v: (s := (q @ k.mT).softmax(-1), k.add_(1.0), s @ v)[2],
        "a tensor that it reads is written into on its way",
    ),
    "weights are written into": (
        lambda q, k, v: (s := (q @ k.mT).softmax(-1), s.mul_(2.0), s @ v)[2],
        "a tensor that it reads is written into on its way",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_cannot_be_read_is_refused_by_its_first_unknown_step(name: str) -> None:
    call, reason = UNREAD[name]
    found = compiled(call, change=True)
    with torch.no_grad():
        torch.testing.assert_close(found.call(Q, K.clone(), V), call(Q, K.clone(), V))
    assert found.reason == f"attention written out: {reason}; call F.scaled_dot_product_attention instead"
