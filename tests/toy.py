"""A small attention model whose heads are really sparse, and inputs for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afbs_compile.tuner.speed import SiteSpeed

HEADS, HEAD_DIM = 4, 32
WIDTH = HEADS * HEAD_DIM
TOKENS = 50


class Attention(nn.Module):
    """Q and K close to the input, so that a head attends to rows like its own; sharpness differs per head."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.sharpness = nn.Parameter(torch.tensor([4.0, 6.0, 8.0, 10.0]).view(1, HEADS, 1, 1))
        with torch.no_grad():
            self.qkv.weight.mul_(0.1)
            self.qkv.weight[:WIDTH] += torch.eye(WIDTH)
            self.qkv.weight[WIDTH : 2 * WIDTH] += torch.eye(WIDTH)
            self.qkv.weight[2 * WIDTH :] += torch.eye(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        o = F.scaled_dot_product_attention(q * self.sharpness, k, v, is_causal=self.causal)
        return self.out(o.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    """Two attention layers with residuals."""

    def __init__(self, causal: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Attention(causal) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * layer(x)
        return x


def drifting(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """``[batch, length, WIDTH]``: a slow random walk on the sphere, so that attention is local but not banded."""
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(batch, length // 64 + 2, WIDTH, generator=generator)
    path = F.interpolate(anchors.transpose(1, 2), size=length, mode="linear", align_corners=True).transpose(1, 2)
    noise = torch.randn(batch, length, WIDTH, generator=generator)
    return F.normalize(path + 0.2 * noise, dim=-1) * WIDTH**0.5 / 2


class LanguageToy(nn.Module):
    """Tokens in, logits out; the positions drift so that attention is sparse."""

    def __init__(self, length: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = Toy()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.register_buffer("positions", drifting(length))
        with torch.no_grad():
            self.head.weight.mul_(20)  # a small change of the output shows

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.positions[:, : input_ids.shape[1]]
        return self.head(self.body(positions + 0.1 * self.embed(input_ids)))


def token_ids(length: int, seed: int = 0) -> Tensor:
    """``[1, length]`` random tokens."""
    return torch.randint(0, TOKENS, (1, length), generator=torch.Generator().manual_seed(seed))


def always_faster(*_: object, **__: object) -> SiteSpeed:
    """Stands in for the stop-watch: what a test decides must not depend on the machine's speed."""
    return SiteSpeed(dense_ms=2.0, sparse_ms=1.0, min_length=128)


def without_a_clock(patch: pytest.MonkeyPatch) -> None:
    """Calibrate as if every sparse call paid and no predictor took time."""
    patch.setattr("afbs_compile.tuner.speed.SiteSpeed.measure", staticmethod(always_faster))
    patch.setattr("afbs_compile.tuner.speed.Stopwatch.attention_ms", lambda *_: 1.0)
    patch.setattr("afbs_compile.tuner.speed.Stopwatch.predictor_ms", lambda *_: 0.0)
