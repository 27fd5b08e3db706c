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

from afbs_compile.kernels import op, predict, predict_triton, reference
from tests.kernels.helpers import NO_SKIP

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

OFF = reference.THETA_OFF
FOLDERS = [Path(__file__).parents[2] / "examples" / "model-7m"]
FOLDERS += [Path(folder) for folder in os.environ.get("AFBS_TEST_MODELS", "").split(":") if folder]
LENGTHS = (4096, 16384, 32768)
BLOCKS = [(64, 64), (128, 64), (128, 128)]
CALLS = {"causal": True, "scale": None}
ROWS = 256
"""Query rows compared at each of a few places: beginning, end and between."""

Operands = tuple[Tensor, Tensor, Tensor]


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
        calls.append((q, k, v))
        return plain(q, k, v, *args, **kwargs)

    found = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", record)
        for length in LENGTHS:
            model(tokens[None, 1000 : 1000 + length], logits_to_keep=1)
            found[length], calls = calls, []
    assert all(len(layers) == model.config.num_hidden_layers for layers in found.values())
    return found


def exact(q: Tensor, k: Tensor, v: Tensor, live: Tensor, rows: slice, blocks: tuple[int, int]) -> Tensor:
    """Float64 attention of some query rows ``[H, rows, D]`` over their live blocks."""
    q, k, v = (x[0].double() for x in (q, k, v))
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
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("length", LENGTHS)
def test_predictor_and_attention_on_real_activations(
    captured: dict[int, list[Operands]], length: int, blocks: tuple[int, int]
) -> None:
    call = {**CALLS, "block_q": blocks[0], "block_k": blocks[1]}
    layers = captured[length]
    sparsities = []
    for q, k, v in layers[:: max(1, len(layers) // 4)]:
        heads = q.shape[1]
        tau = [(0.5, 0.8, 0.95, 0.99)[head % 4] for head in range(heads)]
        theta = [(OFF, OFF, 0.3)[head % 3] for head in range(heads)]
        lists = predict_triton.predict_blocks(q, k, tau, theta, **call)
        live = predict.lists_to_mask(lists, lists.indices.shape[-1])
        expected = reference.predict_mask(q, k, tau, theta, **call)
        differs = live != expected
        # fp32 sums in another order, or a bf16 block mean's last bit: the last block of a row may differ.
        assert float(differs.sum() / expected.sum()) < 1e-3
        assert int(differs.sum(-1).max()) <= 4
        visible = reference.visible_blocks(*live.shape[2:], *blocks, True, q.device)
        sparsities.append(1 - float(live.sum() / visible.sum() / heads))

        out, counts = op.sparse_attention_with_counts(q, k, v, tau, theta, [NO_SKIP] * heads, **call)
        assert torch.equal(counts, lists.counts)
        dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        everything = visible.expand_as(live)
        for start in (0, length // 3 // blocks[0] * blocks[0], length - ROWS):
            rows = slice(start, start + ROWS)
            mine = relative_l1(out[0, :, rows], exact(q, k, v, live, rows, blocks))
            theirs = relative_l1(dense[0, :, rows], exact(q, k, v, everything, rows, blocks))
            # As exact as SDPA: both round weights and result to bf16.
            assert bool((mine <= 2 * theirs + 1e-3).all()), (start, mine, theirs)
    assert sum(sparsities) / len(sparsities) > 0.2, "hardly anything was skipped"
