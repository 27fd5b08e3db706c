"""Tiny models of diffusers with random weights, and inputs for them: text with padding where the model takes a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = 24
"""Tokens of text."""

WIDTH = 32
"""Of its embeddings."""


class Family(NamedTuple):
    """A family of models: how to make a tiny one, what it is called with, and names of its calls that are long."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    calls: frozenset[str]


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Latents like those of a video: neighbours along the last axes are alike."""
    coarse = (*shape[:2], *(max(2, size // 4) for size in shape[2:]))
    noise = torch.randn(coarse, generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(noise, size=shape[2:], mode="trilinear" if len(shape) == 5 else "bilinear")


def text(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(2, TEXT, width, generator=torch.Generator().manual_seed(seed))


def text_mask() -> Tensor:
    """The first prompt is half as long as the second."""
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[0, TEXT // 2 :] = 0
    return mask


def tokens(latents: Tensor) -> Tensor:
    """``[B, C, ...]`` as ``[B, N, C]``."""
    return latents.flatten(2).transpose(1, 2)


TIME = torch.tensor([700.0, 700.0])


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_inputs(seed: int) -> dict[str, Any]:
    latents = smooth(2, 4, 4, 32, 32, seed=seed)
    return {"hidden_states": latents, "timestep": TIME, "encoder_hidden_states": text(seed)}


def hunyuan_video() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def hunyuan_video_inputs(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": smooth(2, 4, 4, 32, 32, seed=seed),
        "timestep": TIME,
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": text(seed)[:, 0, :8],
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=32,
        sample_height=32,
        sample_frames=13,
        max_text_seq_length=TEXT,
    )


def cogvideox_inputs(seed: int) -> dict[str, Any]:
    latents = smooth(2, 4, 4, 32, 32, seed=seed).transpose(1, 2)
    return {"hidden_states": latents, "timestep": TIME, "encoder_hidden_states": text(seed)}


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=WIDTH,
    )


def ltx_inputs(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": tokens(smooth(2, 8, 4, 16, 16, seed=seed)),
        "timestep": TIME,
        "encoder_hidden_states": text(seed),
        "encoder_attention_mask": text_mask(),
        "num_frames": 4,
        "height": 16,
        "width": 16,
    }


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )


def flux_inputs(seed: int) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0))
    return {
        "hidden_states": tokens(smooth(2, 4, 32, 32, seed=seed)),
        "encoder_hidden_states": text(seed),
        "pooled_projections": text(seed)[:, 0, :8],
        "timestep": TIME / 1000,
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3_inputs(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": smooth(2, 4, 64, 64, seed=seed),
        "encoder_hidden_states": text(seed),
        "pooled_projections": text(seed)[:, 0, :8],
        "timestep": TIME,
    }


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image_inputs(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": tokens(smooth(2, 4, 32, 32, seed=seed)),
        "encoder_hidden_states": text(seed),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": TIME / 1000,
        "img_shapes": [[(1, 32, 32)]] * 2,
    }


FAMILIES = {
    "wan": Family(wan, wan_inputs, frozenset({"blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn2", "blocks.1.attn2"})),
    "hunyuan_video": Family(
        hunyuan_video,
        hunyuan_video_inputs,
        frozenset(
            {
                "context_embedder.token_refiner.refiner_blocks.0.attn",
                "transformer_blocks.0.attn",
                "single_transformer_blocks.0.attn",
            }
        ),
    ),
    "cogvideox": Family(
        cogvideox, cogvideox_inputs, frozenset({"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"})
    ),
    "ltx": Family(
        ltx,
        ltx_inputs,
        frozenset(f"transformer_blocks.{block}.{attention}" for block in (0, 1) for attention in ("attn1", "attn2")),
    ),
    "flux": Family(flux, flux_inputs, frozenset({"transformer_blocks.0.attn", "single_transformer_blocks.0.attn"})),
    "sd3": Family(
        sd3,
        sd3_inputs,
        frozenset({"transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"}),
    ),
    "qwen_image": Family(
        qwen_image, qwen_image_inputs, frozenset({"transformer_blocks.0.attn", "transformer_blocks.1.attn"})
    ),
}


def tiny(name: str, seed: int = 0) -> Any:
    """A model of a family, in eval mode."""
    torch.manual_seed(seed)
    return FAMILIES[name].build().eval()


def sharpened(model: Any, sharpness: float = 6.0) -> Any:
    """The model with keys made as queries are, so that a token attends to those like it and blocks can be skipped."""
    with torch.no_grad():
        for module in model.modules():
            for q, k in (("to_q", "to_k"), ("add_q_proj", "add_k_proj")):
                query, key = getattr(module, q, None), getattr(module, k, None)
                if query is not None and key is not None and query.weight.shape == key.weight.shape:
                    key.load_state_dict(query.state_dict())
            norm = getattr(module, "norm_q", None)
            if norm is not None and norm.weight is not None:
                norm.weight.mul_(sharpness)
            elif getattr(module, "to_q", None) is not None:
                module.to_q.weight.mul_(sharpness)
    return model


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the model says, whatever it is called."""
    result: Tensor = model(**inputs, return_dict=False)[0]
    return result
