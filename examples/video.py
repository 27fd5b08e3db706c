"""A video denoised by a small diffusion transformer of diffusers, dense and sparse, with pictures of both.

    pip install diffusers
    python examples/video.py

The transformer's weights are written down, not trained, so that this example is complete on its own. Its attention
averages the patches of the whole video that look alike (non-local means, Buades et al., 2005), the more boldly the
more noise a step has left; that is the denoiser that the patches of the video themselves imply, and a flow-matching
scheduler takes it from noise to the video step by step. The latents are drawn here, so that the result can be measured
against what was drawn. Takes about two minutes on two CPU cores.

It goes to diffusers' attention dispatcher as diffusers' own transformers do, so ``use`` finds and calibrates its calls
while the first steps run. In ``video.png`` four frames stand side by side: drawn, noisy, denoised densely and sparsely.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afbs_compile
import afbs_compile.integrations.diffusers as afbs

# isort: split
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from PIL import Image

PATCH, TILE, HEAD_DIM = 4, 8, 64
START = 0.6  # share of noise that the first step sees
BLUR = 5  # pixels over which patches are smoothed before they are compared
TOLERANCE = 0.08  # a head is an average of many patches, and a later step mends what an earlier one got wrong


class AlikeProcessor:
    """What a patch looks at: patches that look like it, and are near, as :class:`AlikeAttention` weighs the two."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: AlikeAttention, looks: Tensor, places: Tensor, values: Tensor, width: Tensor) -> Tensor:
        """What :meth:`AlikeAttention.forward` returns."""
        x = torch.cat(
            [
                looks[:, :, None] / (attn.boldness[:, None] * width[:, None, None, None]),
                (places[:, None] / attn.nearness[:, None]).expand(len(looks), -1, -1, -1),
            ],
            -1,
        )  # [B, N, heads, 48 + 3]
        # exp(-|x_i - x_j|^2 / 2) is softmax attention: x_i . x_j - |x_j|^2 / 2, and what depends on i alone cancels.
        free = HEAD_DIM - x.shape[-1] - 1
        q = F.pad(torch.cat([x, torch.ones_like(x[..., :1])], -1), (0, free))
        k = F.pad(torch.cat([x, -x.square().sum(-1, keepdim=True) / 2], -1), (0, free))
        v = F.pad(values, (0, HEAD_DIM - values.shape[-1]))[:, :, None].expand(-1, -1, x.shape[2], -1)
        out = dispatch_attention_fn(q, k, v, scale=1.0, backend=self._attention_backend)
        return out.mean(2)[..., : values.shape[-1]]


class AlikeAttention(nn.Module, AttentionModuleMixin):
    """Four heads that differ in how alike and how near patches must be."""

    def __init__(self) -> None:
        super().__init__()
        self.boldness = nn.Parameter(torch.tensor([1.0, 1.3, 1.5, 1.8]))
        self.nearness = nn.Parameter(torch.tensor([0.12, 0.18, 0.25, 0.35]))  # in sides of the video
        self.set_processor(AlikeProcessor())

    def forward(self, looks: Tensor, places: Tensor, values: Tensor, width: Tensor) -> Tensor:
        """Cleaned tokens ``[B, N, C]`` of looks and values ``[B, N, C]``, places ``[N, 3]`` and a width ``[B]``."""
        cleaned: Tensor = self.processor(self, looks, places, values, width)
        return cleaned


class VideoDenoiser(ModelMixin, ConfigMixin):
    """The transformer: each layer compares patches by what the layer before made of them."""

    @register_to_config
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AlikeAttention() for _ in range(layers))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The velocity at latents ``[B, 3, frames, S, S]``, S a multiple of 32, and timesteps ``[B]`` of 0 to 1000."""
        share = (timestep / 1000).to(hidden_states.dtype)[:, None, None, None, None]
        noisy = hidden_states / (1 - share)
        noise = share.flatten() / (1 - share.flatten())  # its standard deviation beside the latents'
        shape = noisy.shape
        values, guess = tokens(noisy), noisy
        for layer, attention in enumerate(self.blocks):
            blurred = F.avg_pool3d(guess, (1, BLUR, BLUR), stride=1, padding=(0, BLUR // 2, BLUR // 2))
            left = noise / (BLUR * 2**layer)  # of the noise, in what is compared
            width = (values.shape[-1] * (left.square() + 0.03**2)).sqrt()
            guess = grid(attention(tokens(blurred), places(shape), values, width), shape)
        return (hidden_states - guess) / share


def tokens(video: Tensor) -> Tensor:
    """``[B, 3, T, S, S]`` as ``[B, N, 48]``, patches of 4 x 4 in tiles of 8 x 8 patches, frame by frame."""
    batch, channels, frames, side, _ = video.shape
    n = side // PATCH // TILE
    cut = video.reshape(batch, channels, frames, n, TILE, PATCH, n, TILE, PATCH)
    return cut.permute(0, 2, 3, 6, 4, 7, 1, 5, 8).reshape(batch, -1, channels * PATCH * PATCH)


def grid(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`tokens`."""
    batch, channels, frames, side, _ = shape
    n = side // PATCH // TILE
    cut = x.reshape(batch, frames, n, n, TILE, TILE, channels, PATCH, PATCH)
    return cut.permute(0, 6, 1, 2, 4, 7, 3, 5, 8).reshape(shape)


def places(shape: torch.Size) -> Tensor:
    """Where each token stands, ``[N, 3]`` in sides of the video; eight frames are as far apart as the two edges."""
    frames, side = shape[2], shape[3]
    line = (torch.arange(side) // PATCH * PATCH) / side
    where = torch.stack(torch.meshgrid(torch.arange(frames) / 8, line, line, indexing="ij"))[None]
    return tokens(where)[0].unflatten(-1, (3, -1))[..., 0]


def scene(frames: int, size: int, seed: int) -> Tensor:
    """Latents ``[1, 3, frames, size, size]`` of a video: rectangles drift over a soft background, values in -1 to 1."""
    draw = torch.Generator().manual_seed(seed)
    soft = F.interpolate(torch.rand(1, 3, 3, 3, generator=draw), size=(size, size), mode="bilinear")
    video = soft[:, :, None].repeat(1, 1, frames, 1, 1)
    for _ in range(12):
        x, y = torch.randint(size, (2,), generator=draw).tolist()
        width, height = torch.randint(size // 8, size // 3, (2,), generator=draw).tolist()
        dx, dy = torch.randint(-2, 3, (2,), generator=draw).tolist()
        colour = torch.rand(3, 1, 1, generator=draw)
        for frame in range(frames):
            left, top = max(0, x + dx * frame), max(0, y + dy * frame)
            video[0, :, frame, top : max(0, y + dy * frame + height), left : max(0, x + dx * frame + width)] = colour
    return 2 * video - 1


def noisy(clean: Tensor, share: float, seed: int) -> Tensor:
    """The latents with a share of noise, as a flow-matching model meets them."""
    return (1 - share) * clean + share * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def shares(steps: int) -> list[float]:
    """The share of noise at each step."""
    return torch.linspace(START, 0.02, steps).tolist()


@torch.no_grad()
def denoise(model: nn.Module, latents: Tensor, steps: int) -> Tensor:
    """Latents with :data:`START` noise, denoised in some steps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=shares(steps))
    for timestep in scheduler.timesteps:
        velocity = model(latents, timestep.expand(len(latents)))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative L1."""
    return ((found - wanted).abs().sum() / wanted.abs().sum()).item()


def psnr(video: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; higher is better."""
    return 10 * (4 / (video - clean).square().mean()).log10().item()


def picture(videos: list[Tensor], path: Path) -> None:
    """The videos side by side, four frames of each under each other."""
    columns = []
    for video in videos:
        frames = video[0, :, torch.linspace(0, video.shape[2] - 1, 4).long()]  # [3, 4, S, S]
        columns.append(F.pad(frames, (2, 2, 2, 2), value=1.0).flatten(1, 2))
    pixels = ((torch.cat(columns, 2).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).contiguous()
    image = Image.fromarray(pixels.numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def seconds(models: list[nn.Module], latents: Tensor, runs: int, steps: int) -> list[float]:
    """Median seconds of a denoising, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(runs):
        for model, spent in zip(models, times, strict=True):
            began = time.perf_counter()
            denoise(model, latents, steps)
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent) for spent in times]


def main(frames: int = 8, size: int = 96, steps: int = 6, runs: int = 3, out: str = "video.png") -> dict[str, float]:
    """Calibrate while one video is denoised, then compare on another one; returns the figures that are printed."""
    model, sparse_model = VideoDenoiser().eval(), afbs.use(VideoDenoiser().eval(), tolerance=TOLERANCE)
    denoise(sparse_model, noisy(scene(frames, size, 0), START, 0), steps)  # calibrates, and checks at later steps
    print(afbs_compile.explain(sparse_model))

    clean = scene(frames, size, 100)
    start = noisy(clean, START, 100)
    dense, sparse = denoise(model, start, steps), denoise(sparse_model, start, steps)
    dense_s, sparse_s = seconds([model, sparse_model], start, runs, steps)
    figures = {
        "noisy dB": psnr(start / (1 - START), clean),
        "dense dB": psnr(dense, clean),
        "sparse dB": psnr(sparse, clean),
        "error": error(sparse, dense),
        "speed": dense_s / sparse_s,
    }
    picture([clean, start, dense, sparse], Path(out))
    print("unseen video: noisy {noisy dB:.2f} dB, dense {dense dB:.2f} dB, sparse {sparse dB:.2f} dB".format(**figures))
    print(f"sparse against dense latents: error {figures['error']:.4f}")
    print(f"{steps} steps: dense {dense_s:.2f} s, sparse {sparse_s:.2f} s: {figures['speed']:.2f}x, median of {runs}")
    print(f"drawn, noisy, dense, sparse, from left to right: {out}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8, help="of the video")
    parser.add_argument("--size", type=int, default=96, help="side of the latents, a multiple of 32")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps")
    parser.add_argument("--out", default="video.png", help="file of the pictures")
    arguments = parser.parse_args()
    main(arguments.frames, arguments.size, arguments.steps, out=arguments.out)
