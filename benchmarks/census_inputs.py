"""Inputs of a model of any architecture, from the names of its arguments and its configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from census_models import LENGTH, PATCHES, SOUND, VOCABULARY
from torch import Tensor, nn
from transformers import PreTrainedConfig

DECODER_LENGTH = 128
"""Not that of the encoder, so that cross attention has two lengths."""

FIRST_TOKEN = 16
FRAMES = 4


class Facts:
    """What a configuration says of inputs, wherever in it.

    Args:
        config: of the model; nested ones are looked through after it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.values = list(_fields(config))

    def get(self, *names: str, default: Any) -> Any:
        """The first of some fields that says something."""
        for name in names:
            for field, value in self.values:
                if field == name and value is not None and not isinstance(value, dict):
                    return value
        return default

    def side(self) -> tuple[int, int]:
        """Height and width of an image."""
        size = self.get("image_size", "img_size", "input_size", "crop_size", default=224)
        return (size, size) if isinstance(size, int) else tuple(size)[-2:]

    def tokens(self, batch: int, length: int) -> Tensor:
        """Tokens that have no meaning of their own to the model, ``[batch, length]``."""
        known = self.get("vocab_size", "text_vocab_size", default=VOCABULARY)
        most = min(known, VOCABULARY) if isinstance(known, int) else VOCABULARY
        special = {value for name, value in self.values if name.endswith(("_id", "_index")) and isinstance(value, int)}
        usual = [token for token in range(most) if token >= min(FIRST_TOKEN, most // 2) and token not in special]
        return torch.tensor(usual)[torch.randint(len(usual), (batch, length))]


def _fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    nested = []
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            nested.append(value)
        else:
            yield name, value
    for inner in nested:
        yield from _fields(inner)


def _image(facts: Facts, batch: int) -> Tensor:
    return torch.randn(batch, facts.get("num_channels", "in_channels", "in_chans", default=3), *facts.side())


def _video(facts: Facts, batch: int) -> Tensor:
    frames = facts.get("num_frames", "frames_per_clip", default=FRAMES)
    return _image(facts, batch * frames).unflatten(0, (batch, frames))


def _patches(facts: Facts, batch: int) -> Tensor:
    patch = facts.get("patch_size", default=16)
    pixels = math.prod(patch) if isinstance(patch, list | tuple) else patch * patch
    frames = facts.get("temporal_patch_size", default=1)
    size = facts.get("num_channels", "in_channels", "in_chans", default=3) * frames * pixels
    return torch.randn(batch, PATCHES * PATCHES, size)


def _grid(batch: int, *sizes: int) -> Tensor:
    return torch.tensor([sizes] * batch)


def _mel(facts: Facts, batch: int) -> Tensor:
    frames = 2 * facts.get("max_source_positions", default=SOUND // 2)
    return torch.randn(batch, facts.get("num_mel_bins", "n_mels", default=80), frames)


def _feature_rows(facts: Facts, batch: int) -> Tensor:
    size = facts.get("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", default=80)
    return torch.randn(batch, SOUND, size)


def _spectrogram(facts: Facts, batch: int) -> Tensor:
    return torch.randn(batch, facts.get("max_length", default=LENGTH), facts.get("num_mel_bins", default=128))


def _waveform(facts: Facts, batch: int) -> Tensor:
    return torch.randn(batch, LENGTH * 320)


def _boxes(facts: Facts, batch: int) -> Tensor:
    corner = torch.randint(0, 100, (batch, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 100, (batch, LENGTH, 2))], -1)


def _series(facts: Facts, batch: int) -> Tensor:
    lags = facts.get("lags_sequence", default=[0])
    length = facts.get("context_length", default=LENGTH) + max(lags if isinstance(lags, list) else [0])
    channels = facts.get("num_input_channels", "input_size", default=1)
    return torch.randn(batch, length, channels) if channels != 1 else torch.randn(batch, length)


MAKERS: dict[str, tuple[Callable[[Facts, int], Tensor], ...]] = {
    "input_ids": (lambda facts, batch: facts.tokens(batch, LENGTH),),
    "decoder_input_ids": (lambda facts, batch: facts.tokens(batch, DECODER_LENGTH),),
    "bbox": (_boxes,),
    "pixel_values": (_image, _video, _patches),
    "pixel_values_videos": (_video,),
    "input_values": (_waveform, _spectrogram, lambda facts, batch: _waveform(facts, batch)[:, None]),
    "input_features": (_mel, _feature_rows),
    "audio_values": (_waveform,),
    "past_values": (_series,),
    "visual_feats": (lambda facts, batch: torch.randn(batch, 36, facts.get("visual_feat_dim", default=2048)),),
    "visual_pos": (lambda facts, batch: torch.rand(batch, 36, 4),),
}
"""Arguments of forward that are made, and the shapes in which models take them, the usual one first."""

REQUIRED: dict[str, tuple[Callable[[Facts, int], Tensor], ...]] = {
    "hidden_states": (lambda facts, batch: _patches(facts, batch).flatten(0, 1),),
    "grid_thw": (lambda facts, batch: _grid(batch, 1, PATCHES, PATCHES),),
    "spatial_shapes": (lambda facts, batch: _grid(batch, PATCHES, PATCHES),),
    "pixel_attention_mask": (lambda facts, batch: torch.ones(batch, PATCHES * PATCHES, dtype=torch.long),),
    "input_features_mask": (lambda facts, batch: torch.ones(batch, SOUND, dtype=torch.long),),
    "query_embeds": (lambda facts, batch: torch.randn(batch, LENGTH, facts.get("hidden_size", default=768)),),
}
"""The same of arguments that are made only where forward has no default for them."""

KNOWN = {**MAKERS, **REQUIRED}


def input_makers(model: nn.Module) -> Iterator[Callable[[int], dict[str, Tensor]]]:
    """What makes a batch of the model's inputs, several to be tried in turn.

    First all arguments that can be made, then the main one with the decoder's tokens, then the main one alone.
    """
    taken = inspect.signature(model.forward).parameters
    main = model.main_input_name
    required = [name for name in REQUIRED if name in taken and taken[name].default is inspect.Parameter.empty]
    everything = [name for name in MAKERS if name in taken] + required
    few = (main, "decoder_input_ids", "bbox", *required)
    sets = [everything, [name for name in everything if name in few]]
    sets.append([name for name in everything if name in (main, *required)])
    if main == "pixel_values" and "input_ids" in everything:
        sets.append(["input_ids"])
    tried = []
    for names in sets:
        if names in tried or not names:
            continue
        tried.append(names)
        for shape in range(max(len(KNOWN[name]) for name in names)):
            yield _maker(Facts(model.config), names, shape)


def _maker(facts: Facts, names: list[str], shape: int) -> Callable[[int], dict[str, Tensor]]:
    def make(batch: int) -> dict[str, Tensor]:
        torch.manual_seed(2)
        return {name: KNOWN[name][min(shape, len(KNOWN[name]) - 1)](facts, batch) for name in names}

    return make
