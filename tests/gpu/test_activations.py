"""The kernels on what trained models really feed them, against the specification in float64.

The model that the repository ships is always used; ``AFBS_TEST_MODELS`` names folders of others, separated by colons.
"""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape, live_of
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.select import triton
from afbs_compile.kernels.spec.selection import live_blocks
from tests.kernels.helpers import OFF, Shape, blocks_id, sparse_call

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

FOLDERS = [Path(__file__).parents[2] / "examples" / "model-7m"]
FOLDERS += [Path(folder) for folder in os.environ.get("AFBS_TEST_MODELS", "").split(":") if folder]
LENGTHS = (4096, 16384, 32768)
BLOCKS = [(64, 64), (128, 64), (128, 128)]
ROWS = 256
"""Query rows compared at each of a few places: beginning, end and between."""


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def captured(request: pytest.FixtureRequest) -> dict[int, list[Operands]]:
    """q, k, v of every attention call of the model, by length."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = transformers.AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.bfloat16).eval().cuda()
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.param)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, device="cuda")
    plain, calls = F.scaled_dot_product_attention, []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(Operands(q, k, v, Causal(), q.shape[-1] ** -0.5))
        return plain(q, k, v, *args, **kwargs)

    found = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", record)
        for length in LENGTHS:
            model(tokens[None, 1000 : 1000 + length], logits_to_keep=1)
            found[length], calls = calls, []
    assert all(len(layers) == model.config.num_hidden_layers for layers in found.values())
    return found


def exact(operands: Operands, live: Tensor, rows: slice, blocks: tuple[int, int]) -> Tensor:
    """Float64 attention of some query rows ``[H, rows, D]`` over their live blocks."""
    q, k, v = (x[0].double() for x in (operands.q, operands.k, operands.v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    places = torch.arange(q.shape[1], device=q.device)
    allowed = live[0][:, places[rows] // blocks[0]].repeat_interleave(blocks[1], -1)[..., : q.shape[1]]
    allowed = allowed & (places <= places[rows, None])
    scores = (q[:, rows] @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def relative_l1(out: Tensor, truth: Tensor) -> Tensor:
    """One number per head."""
    return (out.double() - truth).abs().sum((-1, -2)) / truth.abs().sum((-1, -2))


@torch.no_grad()
@pytest.mark.parametrize("blocks", BLOCKS, ids=blocks_id)
@pytest.mark.parametrize("length", LENGTHS)
def test_predictor_and_attention_on_real_activations(
    captured: dict[int, list[Operands]], length: int, blocks: tuple[int, int]
) -> None:
    layers = captured[length]
    sparsities = []
    for operands in layers[:: max(1, len(layers) // 4)]:
        heads = operands.heads
        tau = [(0.5, 0.8, 0.95, 0.99)[head % 4] for head in range(heads)]
        theta = [(OFF, OFF, 0.3)[head % 3] for head in range(heads)]
        call = sparse_call(Shape(length, heads=heads, blocks=blocks), tau, theta)
        lists = triton.select(operands, call)
        live, expected = live_of(lists), live_blocks(operands, call)
        differs = live != expected
        # fp32 sums in another order, or a bf16 block mean's last bit: the last block of a row may differ.
        assert float(differs.sum() / expected.sum()) < 1e-3
        assert int(differs.sum(-1).max()) <= 4
        visible = operands.mask.visibility(operands.grid(BlockShape(*blocks)), operands.device).visible
        sparsities.append(1 - float(live.sum() / visible.sum() / heads))

        out, counts = run(operands, call)
        assert torch.equal(counts, lists.counts)
        q, k, v = operands.q, operands.k, operands.v
        dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        everything = visible.expand_as(live)
        for start in (0, length // 3 // blocks[0] * blocks[0], length - ROWS):
            rows = slice(start, start + ROWS)
            mine = relative_l1(out[0, :, rows], exact(operands, live, rows, blocks))
            theirs = relative_l1(dense[0, :, rows], exact(operands, everything, rows, blocks))
            # As exact as SDPA: both round weights and result to bf16.
            assert bool((mine <= 2 * theirs + 1e-3).all()), (start, mine, theirs)
    assert sum(sparsities) / len(sparsities) > 0.2, "hardly anything was skipped"
