"""A bidirectional vision model: non-local means, which is attention over the patches of a picture.

    python examples/vision.py

Non-local means (Buades et al., 2005) cleans a patch by averaging the patches of the whole picture that look like it:
softmax attention, every patch sees every other one. It needs no training, so that this example is complete on its own;
a trained vision transformer is calibrated in the same way. The pictures are drawn here, so the quality of the result
can be measured against what was drawn. Takes about a minute on two CPU cores.

It also shows what decides whether attention over pictures is sparse: blocks are 64 tokens that stand next to each
other, so tokens are ordered in tiles of 8 x 8 patches instead of line by line.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afbs_compile

PATCH, TILE, HEAD_DIM = 4, 8, 64
NOISE = 0.15
TOLERANCE = 0.02  # a head is an average of patches: 0.055 would cost almost 2 dB


class NonLocalMeans(nn.Module):
    """One attention layer over the patches of a picture; heads differ in how alike and how near patches must be.

    Args:
        tiles: order the tokens in tiles of 8 x 8 patches, else line by line.
    """

    def __init__(self, tiles: bool = True) -> None:
        super().__init__()
        self.tiles = tiles
        self.register_buffer("likeness", torch.tensor([0.20, 0.25, 0.30, 0.35]))  # bandwidth of a pixel
        self.register_buffer("nearness", torch.tensor([0.15, 0.20, 0.25, 0.30]))  # in sides of the picture

    def forward(self, picture: Tensor) -> Tensor:
        """Clean pictures ``[B, 3, S, S]``; S is a multiple of 32."""
        side = picture.shape[-1] // PATCH
        values = F.pixel_unshuffle(picture, PATCH)  # [B, 48, side, side]
        seen = F.avg_pool2d(F.pad(picture, (2, 2, 2, 2), mode="replicate"), 5, stride=1)  # less noise in the comparison
        looks = F.pixel_unshuffle(seen, PATCH)
        line = torch.linspace(0, 1, side, device=picture.device, dtype=picture.dtype)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(picture), -1, -1, -1)
        heads = [
            torch.cat([looks / (bandwidth * math.sqrt(looks.shape[1])), places / nearness], 1)
            for bandwidth, nearness in zip(self.likeness, self.nearness, strict=True)
        ]
        x = torch.stack([self._tokens(head) for head in heads], 1) * 4  # [B, heads, N, 50]
        # exp(-|x_i - x_j|^2 / 2) is softmax attention: x_i . x_j - |x_j|^2 / 2, and what depends on i alone cancels.
        q = F.pad(torch.cat([x, torch.ones_like(x[..., :1])], -1), (0, HEAD_DIM - x.shape[-1] - 1))
        k = F.pad(torch.cat([x, -x.square().sum(-1, keepdim=True) / 2], -1), (0, HEAD_DIM - x.shape[-1] - 1))
        v = F.pad(self._tokens(values), (0, HEAD_DIM - values.shape[1]))[:, None].expand(-1, x.shape[1], -1, -1)
        cleaned = F.scaled_dot_product_attention(q, k, v, scale=1.0).mean(1)[..., : values.shape[1]]
        return F.pixel_shuffle(self._grid(cleaned, side), PATCH)

    def _tokens(self, grid: Tensor) -> Tensor:
        """``[B, C, side, side]`` as ``[B, side * side, C]``."""
        if not self.tiles:
            return grid.flatten(2).transpose(1, 2)
        cut = grid.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE))  # [B, C, rows, 8, columns, 8]
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)

    def _grid(self, tokens: Tensor, side: int) -> Tensor:
        """The inverse of :meth:`_tokens`."""
        if not self.tiles:
            return tokens.transpose(1, 2).unflatten(2, (side, side))
        cut = tokens.unflatten(1, (side // TILE, side // TILE, TILE, TILE))
        return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def scene(size: int, seed: int) -> Tensor:
    """A picture ``[1, 3, size, size]`` of coloured rectangles over a soft background, values in [0, 1]."""
    draw = torch.Generator().manual_seed(seed)
    picture = F.interpolate(torch.rand(1, 3, 3, 3, generator=draw), size=(size, size), mode="bilinear")
    for _ in range(24):
        x, y = torch.randint(size, (2,), generator=draw).tolist()
        width, height = torch.randint(size // 16, size // 3, (2,), generator=draw).tolist()
        picture[..., y : y + height, x : x + width] = torch.rand(3, 1, 1, generator=draw)
    return picture


def noisy(clean: Tensor, seed: int) -> Tensor:
    """The picture as a bad camera sees it."""
    return clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def psnr(picture: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; higher is better."""
    return -10 * math.log10((picture - clean).square().mean().item())


@torch.no_grad()
def main(size: int = 256, runs: int = 5) -> dict[str, float]:
    """Calibrate, compile, and compare on a picture that was not used; returns the figures that are printed."""
    pictures = [noisy(scene(size, seed), seed) for seed in range(3)]
    clean = scene(size, 100)
    unseen = noisy(clean, 100)
    tokens = (size // PATCH) ** 2
    figures = {}
    for name, tiles in (("line by line", False), ("tiles of 8 x 8", True)):
        recipe = afbs_compile.calibrate(NonLocalMeans(tiles), pictures, tolerance=TOLERANCE, min_length=256)
        heads = [head.sparsity for site in recipe.sites for head in site.heads]
        figures[name] = statistics.mean(heads)
        print(f"{tokens:,} tokens, {name}: {figures[name]:.1%} of the blocks can be skipped")
    print(afbs_compile.explain(recipe))

    model = NonLocalMeans()
    dense = torch.compile(model)
    sparse = torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 256})
    figures["noisy dB"] = psnr(unseen, clean)
    figures["dense dB"] = psnr(dense(unseen), clean)
    figures["sparse dB"] = psnr(sparse(unseen), clean)
    print(
        "unseen picture: noisy {noisy dB:.2f} dB, dense {dense dB:.2f} dB, sparse {sparse dB:.2f} dB".format(**figures)
    )
    dense_s, sparse_s = seconds([dense, sparse], unseen, runs)
    print(f"one picture: dense {dense_s * 1e3:.0f} ms, sparse {sparse_s * 1e3:.0f} ms: {dense_s / sparse_s:.2f}x")
    return figures


def seconds(models: list[Callable[[Tensor], Tensor]], picture: Tensor, runs: int) -> list[float]:
    """Median seconds of a forward pass, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(runs):
        for model, spent in zip(models, times, strict=True):
            began = time.perf_counter()
            model(picture)
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent) for spent in times]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels, a multiple of 32")
    main(parser.parse_args().size)
