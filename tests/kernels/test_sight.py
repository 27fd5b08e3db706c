"""What the operator leaves out of a call before it looks at its blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from afbs_compile.kernels.dense import dense_attention
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.op import sparse_attention
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.sight import every, some, without_idle_parts

LENGTH, USED = 700, 300


def operands(mask: object = None, rows: int = 90, **extras: object) -> Operands:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, rows, 16), torch.randn(2, 2, LENGTH, 16), torch.randn(2, 2, LENGTH, 16)
    return Operands(q, k, v, mask or Full(), 0.25, **extras)


def used() -> torch.Tensor:
    """Of a static cache: no row sees its unused end."""
    return (torch.arange(LENGTH) <= USED - 90 + torch.arange(90)[:, None])[None, None]


def test_valid_keys_that_are_all_valid_go() -> None:
    assert without_idle_parts(operands(valid=torch.ones(2, LENGTH, dtype=torch.bool))).valid is None
    some_keys = torch.arange(LENGTH) > torch.tensor([[0], [-1]])
    assert without_idle_parts(operands(valid=some_keys)).valid is not None


@pytest.mark.parametrize("kind", ["mask", "valid", "both"])
def test_keys_at_the_end_that_no_row_sees_go_in_whole_blocks(kind: str) -> None:
    given = operands(
        attn_mask=used() if kind != "valid" else None,
        valid=(torch.arange(LENGTH) < USED).expand(2, -1) if kind != "mask" else None,
    )
    left = without_idle_parts(given)
    assert left.k_len == 384
    torch.testing.assert_close(dense_attention(left), dense_attention(given))


def test_keys_at_the_positions_of_rows_stay() -> None:
    """Which blocks lie near a row follows from the number of keys, where no mask of its own says it."""
    given = operands(valid=(torch.arange(LENGTH) < 200).expand(2, -1), rows=500)
    assert without_idle_parts(given).k_len == 512


@pytest.mark.parametrize(
    "given",
    [
        operands(),
        operands(attn_mask=torch.zeros(1, 1, 90, LENGTH).masked_fill(~used(), -torch.inf)),
        operands(attn_mask=torch.zeros(1, 1, 90, LENGTH, dtype=torch.bool)),
        replace(operands(Causal()), valid=(torch.arange(LENGTH) < USED).expand(2, -1)),
    ],
    ids=["no mask", "a bias", "nothing is seen", "a formula counts the keys"],
)
def test_other_calls_are_left_as_they_are(given: Operands) -> None:
    assert without_idle_parts(given) is given


def test_the_operator_measures_its_length_without_them() -> None:
    given = operands(attn_mask=used())
    constants = ([0.3] * 4, [-1.0] * 4, [-1000.0] * 4, "full")
    extras = {"attn_mask": given.attn_mask, "scale": 0.25}
    dense = dense_attention(given)
    # 90 x 384 is less than 200 x 200, which 90 x 700 is not.
    out = sparse_attention(given.q, given.k, given.v, *constants, min_length=200, **extras)
    torch.testing.assert_close(out, dense)
    sparse = sparse_attention(given.q, given.k, given.v, *constants, min_length=150, **extras)
    assert not torch.allclose(sparse, dense)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_some_and_every_are_any_and_all(dim: int) -> None:
    x = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) > 0.7
    for given in (x, x.transpose(0, 2), x[:, :1].expand(-1, 4, -1)):
        assert torch.equal(some(given, dim), given.any(dim))
        assert torch.equal(every(given, dim), given.all(dim))
