"""What the vLLM plugin is made of, without vLLM: pages, batches, heads of a rank."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afbs_compile.errors import RecipeError
from afbs_compile.integrations.vllm import stats
from afbs_compile.integrations.vllm.batch import Request, Split, long_requests, reduced
from afbs_compile.integrations.vllm.models import Calls
from afbs_compile.integrations.vllm.paged import DIGIT, Order, Pages
from afbs_compile.kernels.call import SparseCall
from afbs_compile.recipe import HeadRecipe, SiteRecipe
from afbs_compile.shards import Heads, of_part

TOKENS, DIM, HEADS = 32, 16, 3


def in_columns(page: torch.Tensor) -> torch.Tensor:
    return page.transpose(-1, -2).reshape(page.shape)


def in_pairs(page: torch.Tensor) -> torch.Tensor:
    """As kernels want it that multiply pairs of halves: two neighbouring dimensions of a token beside each other."""
    return page.unflatten(-1, (DIM // 2, 2)).transpose(-2, -3).reshape(page.shape)


LAYOUTS = {"rows": lambda page: page, "columns": in_columns, "other": in_pairs}


def order_of(layout: Any) -> Order | None:
    token = torch.arange(TOKENS)[:, None].expand(TOKENS, DIM)
    dim = torch.arange(DIM).expand(TOKENS, DIM)
    numbers = (token // DIGIT, token % DIGIT, dim // DIGIT, dim % DIGIT)
    return Order.of([layout(number.bfloat16()) for number in numbers])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("first", "window"), [(0, None), (20, None), (64, None), (97, None), (97, 40), (97, 1)])
def test_keys_come_out_of_pages_as_they_went_in(kind: str, first: int, window: int | None) -> None:
    order = order_of(LAYOUTS[kind])
    assert order is not None
    assert order.kind == kind
    keys, values = torch.randn(2, first + 7, HEADS, DIM)
    stored = torch.full((2, 9, HEADS, TOKENS, DIM), torch.nan)
    table = torch.tensor([5, 0, 8, 2, 7], dtype=torch.int32)
    for cache, x in zip(stored, (keys, values), strict=True):
        for place, number in enumerate(table.tolist()):
            part = x[:first][place * TOKENS : (place + 1) * TOKENS]
            page = torch.full((TOKENS, HEADS, DIM), torch.nan)
            page[: len(part)] = part
            cache[number] = LAYOUTS[kind](page.transpose(0, 1))
    stats.reset()
    pages = Pages(stored[0], stored[1], order, order)
    found = pages.gathered(table, first, keys[first:], values[first:], window)
    seen = first + 7 if window is None else min(first + 7, 7 + window - 1)
    for out, x in zip(found, (keys, values), strict=True):
        assert out.shape[2] >= seen
        assert out.shape[2] < seen + TOKENS
        assert torch.equal(out[0].transpose(0, 1), x[len(x) - out.shape[2] :])
    copied = found[0].shape[2] - 7
    assert stats.STATS.gathered_bytes == 2 * copied * HEADS * DIM * 4


def test_a_page_that_keeps_no_element_apart_has_no_order() -> None:
    assert order_of(torch.zeros_like) is None


@dataclass
class Common:
    """The fields of vLLM's own that are read."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: Any = True
    positions: torch.Tensor | None = None
    is_prefilling: torch.Tensor | None = None
    req_idx: Any = None
    rswa_prefix_lens: torch.Tensor | None = None
    _num_computed_tokens_cache: Any = None
    _token_to_req_indices_cache: Any = None

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


def common(rows: list[int], keys: list[int], **other: Any) -> Common:
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    lengths, total = torch.tensor(keys, dtype=torch.int32), sum(rows)
    table = torch.arange(len(rows) * 4).view(-1, 4)
    return Common(
        starts, starts, lengths, lengths, len(rows), total, max(rows), max(keys), table, torch.arange(total), **other
    )


def test_long_requests_are_those_of_many_rows_and_much_work() -> None:
    step = common([1, 512, 127, 128, 0], [4000, 512, 4000, 4000, 1])
    assert long_requests(step, 512 * 512) == (Request(1, 1, 512, 512), Request(3, 640, 128, 4000))
    assert long_requests(step, 512 * 512 + 1) == (Request(3, 640, 128, 4000),)


@pytest.mark.parametrize("other", [{"causal": False}, {"causal": torch.ones(2)}, {"rswa_prefix_lens": torch.ones(2)}])
def test_a_step_whose_rows_see_something_else_is_left_alone(other: dict[str, Any]) -> None:
    assert long_requests(common([512, 1], [512, 9]), 1)
    assert not long_requests(common([512, 1], [512, 9], **other), 1)


def test_the_batch_without_some_requests() -> None:
    step = common([1, 512, 3, 0], [40, 512, 60, 1], positions=torch.arange(516) * 10)
    made = reduced(step, {1})
    assert made is not None
    rest, rows = made
    assert rows.tolist() == [0, 513, 514, 515]
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 1, 4]
    assert rest.query_start_loc.dtype == torch.int32
    assert rest.seq_lens.tolist() == [40, 60]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len, rest.max_seq_len) == (2, 4, 3, 60)
    assert torch.equal(rest.block_table_tensor, step.block_table_tensor[[0, 2]])
    assert rest.slot_mapping.tolist() == rows.tolist()
    assert rest.positions.tolist() == (rows * 10).tolist()
    assert reduced(step, {0, 1, 2}) is None


def test_layers_that_take_the_same_requests_share_the_rest() -> None:
    built = []
    split = Split(None, (), common([1, 512], [40, 512]), lambda made: built.append(made) or len(built))
    first, again, other = split.without({1}), split.without([1]), split.without({0})
    assert first is again
    assert first is not None
    assert other is not None
    assert (first[0], other[0], len(built)) == (1, 2, 2)


def site(heads: int, kv_heads: int, outcome: Any = "sparse", min_length: int = 512) -> SiteRecipe:
    call = replace(SparseCall.uniform(heads, 0.9, policy="cumulant"), min_length=min_length)
    call = call.with_tau(torch.arange(heads) / 10)
    measured = tuple(HeadRecipe("sparse", head / 100, 0.01, (0.01,)) for head in range(heads))
    return SiteRecipe("there", outcome, mask="causal", head_dim=64, kv_heads=kv_heads, call=call, heads=measured)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rank", "first"), [(8, 4, 0, 0), (4, 2, 1, 4), (2, 1, 3, 6), (1, 1, 5, 5)]
)
def test_a_rank_has_its_own_heads(heads: int, kv_heads: int, rank: int, first: int) -> None:
    mine = of_part("here", site(8, 4), Heads(heads, kv_heads, 64), rank)
    assert mine.name == "here"
    assert mine.calibrated.tau == pytest.approx([(first + head) / 10 for head in range(heads)])
    assert [head.sparsity for head in mine.heads] == [(first + head) / 100 for head in range(heads)]
    assert mine.kv_heads == kv_heads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rank"), [(3, 1, 64, 0), (8, 2, 64, 0), (8, 4, 32, 0), (4, 2, 64, 2), (16, 4, 64, 0)]
)
def test_heads_that_are_no_part_of_the_call_are_refused(heads: int, kv_heads: int, dim: int, rank: int) -> None:
    with pytest.raises(RecipeError, match=r"belongs to another model: there has 8 heads of 64 over 4, here has"):
        of_part("here", site(8, 4), Heads(heads, kv_heads, dim), rank)


def test_which_requests_a_layer_takes() -> None:
    sites = {"a": site(4, 2), "b": site(4, 2, "dense"), "c": site(4, 2, min_length=1024)}
    calls = Calls(None, sites)  # type: ignore[arg-type]
    assert calls.least_work == 512**2
    assert calls.takes("a", 512, 512)
    assert not calls.takes("a", 511, 512)
    assert not calls.takes("b", 4096, 4096)
    assert not calls.takes("c", 512, 512)
    assert not calls.takes("unknown", 4096, 4096)


def test_an_engine_that_refuses_leaves_the_layer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def attend(self, name: str, operands: Any) -> None:
            raise ValueError("head_dim is 7\nand more")

    said: list[str] = []
    monkeypatch.setattr("afbs_compile.integrations.vllm.models._say", said.append)
    calls = Calls(Refuses(), {"a": site(4, 2)})  # type: ignore[arg-type]
    assert calls.attend("a", lambda: None) is None  # type: ignore[arg-type]
    assert not calls.takes("a", 4096, 4096)
    assert said == ["there stays dense: head_dim is 7"]


def test_where_nothing_compiles_all_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> None:
        raise RuntimeError("no C++ compiler")

    said: list[str] = []
    monkeypatch.setattr("afbs_compile.integrations.vllm.models.run", fails)
    monkeypatch.setattr("afbs_compile.integrations.vllm.models._say", said.append)
    calls = Calls(None, {"a": site(4, 2), "b": site(4, 2)})  # type: ignore[arg-type]
    impl = SimpleNamespace(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125)
    calls.warm({"a": SimpleNamespace(impl=impl)}, torch.float32, torch.device("cpu"))
    assert (calls.count, calls.least_work) == (0, None)
    assert said == ["attention stays dense: no C++ compiler"]


def test_the_package_does_not_import_vllm() -> None:
    code = "import sys, afbs_compile, afbs_compile.integrations.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
