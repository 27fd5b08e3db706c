"""``varlen_attn``: packed sequences are one call with a mask of documents, on a kernel of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.window import Around, Window
from afbs_compile.passes.effects import function_name
from afbs_compile.passes.varlen import NAME
from tests.passes.conftest import Compiled, compiled, select_everything

varlen = pytest.importorskip("torch.nn.attention.varlen")

TOKENS, HEADS, DIM = 90, 4, 16
STARTS = torch.tensor([0, 20, 57, TOKENS], dtype=torch.int32)


def by_document(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, scale: float | None = None, window_size: list[int] | None = None, enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the operator's documentation says, a document at a time."""
    out = torch.empty_like(query)
    left, right = window_size or (-1, -1)
    for first, last in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        ahead = torch.arange(last - first)[None] - torch.arange(last - first)[:, None]
        seen = (ahead <= (right if right >= 0 else TOKENS)) & (ahead >= -(left if left >= 0 else TOKENS))
        document = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        out[first:last] = document[0].transpose(0, 1)
    return out, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", by_document)


def operands(kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, HEADS, DIM, generator=generator)
    k, v = torch.randn(2, TOKENS, kv_heads, DIM, generator=generator)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, **options: Any) -> Tensor:
    return varlen.varlen_attn(q, k, v, starts, starts, 40, 40, **options).flatten(1) * 2.0


def run(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> tuple[Compiled, Any]:
    found = compiled(function, change=True, dynamic=dynamic, call=select_everything)
    with torch.no_grad():
        return found, found.call(*inputs)


WINDOWS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "none": (lambda *given: attend(*given, scale=0.3), Full()),
    "causal": (lambda *given: attend(*given, scale=0.3, window_size=(-1, 0)), Causal()),
    "behind": (lambda *given: attend(*given, scale=0.3, window_size=(15, 0)), Window(16)),
    "around": (lambda *given: attend(*given, scale=0.3, window_size=(9, 3)), Around(9, 3)),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_is_found_and_computes_the_same(window: str, dynamic: bool) -> None:
    call, mask = WINDOWS[window]
    found, out = run(call, *operands(), STARTS, dynamic=dynamic)
    site = found.site
    assert site.mask == mask
    assert (site.heads, site.q_len, site.batch, site.scale) == (HEADS, TOKENS, 1, 0.3)
    assert site.attn_mask is not None
    assert NAME not in {function_name(node) for node in found.graphs[-1].graph.nodes}
    torch.testing.assert_close(out, call(*operands(), STARTS), rtol=1e-4, atol=1e-5)


def test_other_documents_need_no_other_graph() -> None:
    found, _ = run(attend, *operands(), STARTS)
    other = torch.tensor([0, 50, 61, TOKENS], dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(found.call(*operands(), other), attend(*operands(), other), rtol=1e-4, atol=1e-5)
    assert len(found.graphs) == 1


def test_grouped_heads_and_layers_that_share_the_mask() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        for _ in range(2):
            q = q + attend(q, k, v, starts, window_size=(-1, 0), enable_gqa=True).view_as(q)
        return q

    found, out = run(call, *operands(2), STARTS)
    first, second = found.sites[-1]
    assert (first.kv_heads, second.kv_heads) == (2, 2)
    assert first.attn_mask is second.attn_mask
    torch.testing.assert_close(out, call(*operands(2), STARTS), rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "other keys": (
        lambda q, k, v, starts: varlen.varlen_attn(q, k, v, starts, starts + 0, 40, 40),
        "its keys are not packed as its queries are",
    ),
    "log-sum-exp": (
        lambda q, k, v, starts: varlen.varlen_attn(
            q, k, v, starts, starts, 40, 40, return_aux=varlen.AuxRequest(lse=True)
        ),
        "its log-sum-exp is used",
    ),
    "written positions": (
        lambda q, k, v, starts: (
            a := varlen.varlen_attn(q, k, v, starts, starts, 40, 40),
            starts[1:2].sub_(1),
            varlen.varlen_attn(a, k, v, starts, starts, 40, 40),
        )[2],
        "its tensor of positions is written into",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, reason = REFUSED[name]
    found, out = run(call, *operands(), STARTS.clone())
    expected = call(*operands(), STARTS.clone())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert reason in found.refusals[-1][0].reason
