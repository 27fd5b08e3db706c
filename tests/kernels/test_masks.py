"""Masks: what they say of rows and keys, of blocks, of work, to kernels and to PyTorch, and as text."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.blocks import BlockShape, Grid
from afbs_compile.kernels.masks import band
from afbs_compile.kernels.masks.base import Band, BandMask, Mask
from afbs_compile.kernels.masks.causal import Causal, CausalEnd
from afbs_compile.kernels.masks.full import Full
from afbs_compile.kernels.masks.registry import MASKS, mask_of
from afbs_compile.kernels.masks.window import Around, Chunk, Window
from afbs_compile.kernels.operands import Operands
from tests.masks import Dilated

CPU = torch.device("cpu")
KINDS = ", ".join(MASKS)


@dataclass(frozen=True)
class Shifted(BandMask):
    """Causal with the rows at the end of the keys, and ``ahead`` keys that a row sees after itself."""

    name = "shifted"
    words = "shifted"
    local = True
    ahead: int

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        return keys <= positions + self.ahead

    def offset(self, q_len: int, k_len: int) -> int:
        return k_len - q_len

    def band(self, q_len: int, k_len: int) -> Band:
        return Band(self.offset(q_len, k_len) + self.ahead)


ONE_BOUND: list[BandMask] = [Full(), Causal(), CausalEnd(), Shifted(0), Shifted(5), Shifted(-3)]
BANDS: list[BandMask] = [*ONE_BOUND, Window(1), Window(70), Chunk(33), Chunk(64), Around(7, 4), Around(90, 40)]


def grids(count: int) -> list[Grid]:
    """Grids of every block shape, most with two lengths that differ."""
    draw = random.Random(2)
    some = [Grid(1, 1, BlockShape(64, 64)), Grid(64, 64, BlockShape(64, 32)), Grid(128, 130, BlockShape(128, 64))]
    for _ in range(count):
        block_k = draw.choice([16, 32, 64])
        q_len = draw.randint(1, 400)
        k_len = q_len if draw.random() < 0.3 else draw.randint(1, 400)
        some.append(Grid(q_len, k_len, BlockShape(block_k * draw.choice([1, 2]), block_k)))
    return some


@pytest.mark.parametrize("mask", BANDS, ids=str)
def test_a_bands_blocks_are_those_of_its_elements(mask: BandMask) -> None:
    for grid in grids(40):
        found, expected = mask.visibility(grid, CPU), Mask.visibility(mask, grid, CPU)
        assert torch.equal(found.visible, expected.visible), grid
        assert torch.equal(found.whole, expected.whole), grid
        assert torch.equal(found.blurred, expected.blurred), grid


@pytest.mark.parametrize("mask", [*BANDS, Dilated(3)], ids=str)
def test_blocks_are_what_the_matrix_holds(mask: Mask) -> None:
    for grid in grids(6):
        seen, (visible, whole, blurred) = mask.matrix(grid.q_len, grid.k_len, CPU), mask.visibility(grid, CPU)
        assert visible.shape == whole.shape == (grid.count_q, grid.count_k)
        for i, rows in enumerate(seen.split(grid.shape.q)):
            for j, tile in enumerate(rows.split(grid.shape.k, 1)):
                assert visible[i, j] == tile.any()
                assert whole[i, j] == (tile.all() and tile.shape[1] == grid.shape.k)
                assert blurred[i, j] == (tile.any() and not tile.any(0).all())


@pytest.mark.parametrize("mask", BANDS, ids=str)
def test_a_bands_work_is_that_of_its_elements(mask: BandMask) -> None:
    for q_len, k_len, _ in grids(40):
        assert mask.work(q_len, k_len) == Mask.work(mask, q_len, k_len), (q_len, k_len)


@pytest.mark.parametrize("mask", BANDS, ids=str)
def test_a_band_is_the_mask(mask: BandMask) -> None:
    for q_len, k_len, _ in grids(10):
        band = mask.band(q_len, k_len)
        rows, keys = torch.arange(q_len)[:, None], torch.arange(k_len)
        expected = (keys <= rows + band.upper) & (keys >= band.start(rows)) if band.bounded else (rows + keys >= 0)
        assert torch.equal(mask.matrix(q_len, k_len, CPU), expected)


@pytest.mark.parametrize(
    "mask", [Full(), Causal(), CausalEnd(), Window(20), Chunk(16), Around(9, 9), Dilated(2)], ids=str
)
def test_pytorch_is_told_the_same(mask: Mask) -> None:
    q, k, v = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (70, 90, 90))
    arguments = mask.sdpa_arguments(70, 90, CPU)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.matrix(70, 90, CPU))
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **arguments), expected)


def test_masks_are_values_with_a_text() -> None:
    assert mask_of("causal") == Causal() == mask_of(str(Causal()))
    assert mask_of("full") == Full() != Causal()
    assert hash(Causal()) == hash(mask_of("causal"))
    assert (str(Dilated(3)), Dilated(3) == Dilated(3), Dilated(3) == Dilated(2)) == ("dilated(3)", True, False)
    assert list(MASKS) == ["full", "causal", "causal_end", "window", "chunk", "around"]
    assert (Full.hides_nothing, Causal.hides_nothing) == (True, False)
    assert (Full.local, Causal.local) == (False, True)


@pytest.mark.parametrize("text", ["banded", "", "causal(1)", "causal(", "causal()", "full(a)", "dilated(3)", "Causal"])
def test_other_texts_are_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'mask is {text!r}; accepted: {KINDS}')}$"):
        mask_of(text)


def test_a_kind_with_parameters_is_read_from_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MASKS, "dilated", Dilated)
    monkeypatch.setitem(MASKS, "shifted", Shifted)
    assert mask_of("dilated(7)") == Dilated(7)
    assert mask_of("shifted(-7)") == Shifted(-7)
    for text in ("dilated", "dilated(1,2)", "dilated(x)", "dilated(7"):
        with pytest.raises(ValueError, match=f"accepted: {KINDS}, dilated, shifted"):
            mask_of(text)
    mask_of.cache_clear()


def operands(mask: Mask, q_len: int, k_len: int) -> Operands:
    q, k = (torch.empty(1, 1, n, 16, device="meta") for n in (q_len, k_len))
    return Operands(q, k, k, mask, 0.25)


def test_kernels_are_told_of_bands_alone() -> None:
    assert band.told(operands(Full(), 9, 9)) == Band(0, bounded=False)
    assert band.told(operands(Causal(), 9, 9)) == Band(0)
    assert band.told(operands(Shifted(2), 9, 12)) == Band(5)
    assert band.refusal(operands(Causal(), 9, 9)) is None
    sentence = r"^mask is dilated\(3\); accepted: masks that are a band about the diagonal$"
    assert band.refusal(operands(Dilated(3), 9, 9)) == sentence[1:-1].replace("\\", "")
    with pytest.raises(ValueError, match=sentence):
        band.told(operands(Dilated(3), 9, 9))


def test_kernels_refuse_what_they_are_not_told_of() -> None:
    plain, valid = operands(Causal(), 9, 9), torch.ones(1, 9, dtype=torch.bool, device="meta")
    assert band.refusal(replace(plain, valid=valid, softcap=2.0)) == "valid, softcap given; accepted: calls without"
    assert band.extras_refusal(replace(plain, valid=valid), takes_valid=True) is None
    assert band.refusal(operands(Window(4), 9, 9)) == "mask is window(4); accepted: bands that start at the first key"
    assert "over 9 rows and 5 keys" in str(band.refusal(operands(CausalEnd(), 9, 5)))
    shape = BlockShape(64, 64)
    assert band.selection_refusal(operands(CausalEnd(), 64, 128), shape) is None
    assert "row 0 is at key 65" in str(band.selection_refusal(operands(CausalEnd(), 64, 129), shape))
    assert "128 rows over 64 keys" in str(band.selection_refusal(operands(Causal(), 128, 64), shape))


@pytest.mark.parametrize("mask", [Causal(), CausalEnd(), Window(9), Chunk(8), Around(3, 2)], ids=str)
@pytest.mark.parametrize("lengths", [(40, 40), (24, 40)], ids=str)
def test_a_matrix_is_recognised(mask: Mask, lengths: tuple[int, int]) -> None:
    seen = mask.matrix(*lengths, CPU)
    found = next(
        other
        for each in MASKS.values()
        for other in each.proposed(seen)
        if torch.equal(other.matrix(*lengths, CPU), seen)
    )
    assert found == (Causal() if mask == CausalEnd() and lengths[0] == lengths[1] else mask)


@pytest.mark.parametrize("mask", ONE_BOUND, ids=str)
def test_no_query_block_has_more_partial_blocks_than_is_said(mask: BandMask) -> None:
    for grid in grids(40):
        visible, whole, _ = mask.visibility(grid, CPU)
        most = int((visible & ~whole).sum(-1).max())
        said = band.partial_at_most(operands(mask, grid.q_len, grid.k_len), grid.shape)
        assert most <= said, grid
        assert said <= grid.shape.q // grid.shape.k + 1
