"""Tiny models of every architecture: a configuration class's own defaults, made small by the names of its fields."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, ResNetConfig

LENGTH = 192
"""Tokens of a text, and about as many rows of anything else."""

SOUND = 400
"""Frames of a spectrogram whose rows a model then halves."""

VOCABULARY = 256
LAYERS = 2
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH, INNER = HEADS * HEAD_DIM, 96
POSITIONS = 512
WINDOW = 64
"""Less than a sequence, so that windows hide something."""

PATCHES = 14
"""Of an image's side: 196 patches are about as many as a text has tokens."""

LARGEST_SIDE = 224
MOST_PARAMETERS = 200_000_000

LEVELS = (
    ("all but head sizes", frozenset({"layers", "fewer heads", "sizes"})),
    ("all", frozenset({"layers", "heads", "widths", "sizes"})),
    ("all but widths", frozenset({"layers", "sizes"})),
    ("all but layers", frozenset({"heads", "widths", "sizes"})),
    ("vocabulary, positions, experts, images", frozenset({"sizes"})),
    ("nothing", frozenset()),
)
"""What is made small, the most first: fields of some architectures depend on each other in ways of their own."""

COUNTED_HEADS = (
    r"(kv|key_value|multi_query)_.*heads?|heads?_(kv|key_value)|num_kv$",
    r"(^|_)(n|num)_?.*heads?$|attention_heads$|^heads$",
)
"""Words of numbers of heads: of keys, and of any."""

RULES: tuple[tuple[str, str, int | str], ...] = (
    ("sizes", r"(^|_)vocab_size|^n_vocab$|num_.*tokens?_types?$", VOCABULARY),
    ("sizes", r"max_source_positions$", SOUND // 2),
    ("sizes", r"max_length$", LENGTH),
    ("sizes", r"max_.*positions?(_embeddings)?$|^n_positions$|^n_ctx$|max_seq_len|max_context", POSITIONS),
    ("sizes", r"^sliding_window$|attention_window$|attention_chunk_size|^local_attention$|^window_size$", WINDOW),
    ("sizes", r"n_group$|topk_group$|num_expert_group", 1),
    ("sizes", r"experts_per_tok|top_?k_?experts|^moe_?top_?k$|^moe_k$|^num_selected_experts$", 2),
    ("sizes", r"n_?(um)?_?(routed_|local_|moe_)?experts$|^moe_num_experts$", 4),
    ("layers", r"first_k_dense_replace|num_hash_layers", 1),
    ("layers", r"(^|_)n?_?layers?$|(^|_)depth$|^num_blocks$|num_.*_blocks$|^n_block$", LAYERS),
    ("heads", COUNTED_HEADS[0], "kv_heads"),
    ("heads", COUNTED_HEADS[1], HEADS),
    ("heads", r"qk_rope_head_dim|^rotary_dim$", HEAD_DIM // 2),
    ("heads", r"^qk_head_dim$", HEAD_DIM + HEAD_DIM // 2),
    ("heads", r"head_dim$|head_size$|^d_kv$|^kv_channels$|^d_head$|head_dims?$|^attention_key_size$", HEAD_DIM),
    ("widths", r"lora_rank$|rank$", WIDTH // 2),
    ("widths", r"intermediate|ffn|mlp_dim|^d_ff$|^d_inner|inner|feed_?forward", INNER),
    ("widths", r"hidden_(size|dim)$|d_model$|n_embd$|(^|_)dim$|embed_dim$|width$|embedding_(size|dim)$", WIDTH),
    ("widths", r"(proj|projection)_(dim|size)$|text_hidden|vision_hidden|audio_hidden|out_hidden", WIDTH),
)  # fmt: skip
"""Part, words of a field's name, and what larger numbers become; the first that fits counts."""


COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names for the number of layers, where that is one number."""


def architectures() -> dict[str, str]:
    """Model types of transformers' AutoModel map and the model class of each."""
    found = {}
    for name, model in AutoModel._model_mapping._model_mapping.items():
        found[name] = model if isinstance(model, str) else model[0]
    return found


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a model type."""
    return AutoModel._model_mapping._load_attr_from_module(
        model_type, AutoModel._model_mapping._config_mapping[model_type]
    )


def tiny_models(model_type: str) -> Iterator[tuple[str, nn.Module | Exception]]:
    """The model at each level of :data:`LEVELS`, or the exception that it raised, until the caller has enough."""
    cls = config_class(model_type)
    for level, parts in LEVELS:
        torch.manual_seed(0)
        try:
            config = Shrinking(parts).of(cls())
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters")
            model = AutoModel.from_config(config, dtype=torch.float32).eval()
        except Exception as error:
            yield level, error
        else:
            yield level, model


class Shrinking:
    """Makes configurations small.

    Args:
        parts: what is made small, as the first column of :data:`RULES` names it.
    """

    def __init__(self, parts: frozenset[str]) -> None:
        self.parts = parts
        self.token_ids: dict[str, int] = {}

    def of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A small configuration of the same class, whose nested ones are small as well."""
        if config.model_type == "timm_backbone":  # of a library of its own
            return ResNetConfig(depths=[1] * 4, out_features=[f"stage{index}" for index in config.out_indices or [4]])
        known = {field.name for field in dataclasses.fields(config)}  # the others are computed from them
        fields = {name: value for name, value in vars(config).items() if name in known}
        layers = self.layers_kept(fields)
        changed: dict[str, Any] = {}
        for name, value in fields.items():
            if isinstance(value, PreTrainedConfig):
                changed[name] = self.of(value)
                continue
            small = self.value(name, value, fields, layers)
            if small != value:
                changed[name] = small
        return type(config)(**changed) if changed else config

    def layers_kept(self, fields: dict[str, Any]) -> list[int]:
        """Layers to keep: the first of each type, at least :data:`LAYERS`."""
        types = fields.get("layer_types")
        kept = [types.index(kind) for kind in dict.fromkeys(types)] if isinstance(types, list) else []
        others = [index for index in range(_layers(fields)) if index not in kept]
        return sorted(kept + others[: max(0, LAYERS - len(kept))])

    def value(self, name: str, value: Any, fields: dict[str, Any], layers: list[int]) -> Any:
        """What a field becomes; itself where no rule is about it."""
        if isinstance(value, bool) or not value:
            return value
        if "sizes" in self.parts:
            if re.search(r"(token|pad|bos|eos|sep|cls)_?(id|ids|index)$", name):
                return self.ids(name, value)
            if name in ("image_size", "img_size", "input_size"):
                return self.image(value, fields)
        if isinstance(value, int):
            return self.number(name, value, fields, layers)
        if isinstance(value, dict) and "heads" in self.parts:
            return {key: self.section(key, entry, fields) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return self.items(name, value, fields, layers)
        return value

    def number(self, name: str, value: int, fields: dict[str, Any], layers: list[int]) -> int:
        """A number by the first rule that its name fits."""
        for part, words, most in RULES:
            if not re.search(words, name):
                continue
            if part == "widths" and "fewer heads" in self.parts:
                return value * HEADS // max(HEADS, _heads(fields))
            if part not in self.parts and not (words in COUNTED_HEADS and "fewer heads" in self.parts):
                return value
            if most == "kv_heads":
                most = HEADS if value == _heads(fields) else KV_HEADS
            if name in COUNTS:
                return len(layers) or value
            return POSITIONS if most == POSITIONS else min(value, int(most))
        return value

    def items(self, name: str, value: Any, fields: dict[str, Any], layers: list[int]) -> Any:
        """A list with an entry for each layer loses those of the layers that go; numbers of layers become 1."""
        kind = type(value)
        if "sizes" in self.parts and re.search("attention_window", name):
            value = kind(min(entry, WINDOW) for entry in value)
        if "layers" not in self.parts:
            return value
        if re.search(r"depths?$|num_.*layers$|layer_depths", name) and all(isinstance(n, int) for n in value):
            return kind(1 for _ in value)
        if len(value) == _layers(fields):
            return kind(value[index] for index in layers)
        if re.search(r"(index(es)?|indices|_layers)$", name) and all(isinstance(n, int) for n in value):
            return kind(sorted({min(n, LAYERS - 1) for n in value}))
        return value

    def section(self, key: str, value: Any, fields: dict[str, Any]) -> Any:
        """Parts of a head that turn by different positions are as long together as half of what turns."""
        if isinstance(value, dict):
            return {inner: self.section(inner, entry, fields) for inner, entry in value.items()}
        if key != "mrope_section" or not isinstance(value, list):
            return value
        total = HEAD_DIM // 2
        small = [max(1, n * total // sum(value)) for n in value]
        return [small[0] + total - sum(small), *small[1:]]

    def ids(self, name: str, value: Any) -> Any:
        """Tokens of a meaning of their own stay apart from each other in the small vocabulary."""
        if isinstance(value, list | tuple):
            return type(value)(self.ids(f"{name}{index}", one) for index, one in enumerate(value))
        if not isinstance(value, int) or value < VOCABULARY:
            return value
        return self.token_ids.setdefault(name, VOCABULARY - 1 - len(self.token_ids))

    def image(self, value: Any, fields: dict[str, Any]) -> Any:
        """Sides with about as many patches as a text has tokens."""
        if isinstance(value, list | tuple):
            return type(value)(self.image(side, fields) for side in value)
        patch = fields.get("patch_size")
        patch = patch[0] if isinstance(patch, list | tuple) and patch else patch
        if not isinstance(value, int) or value <= LARGEST_SIDE:
            return value
        return PATCHES * patch if isinstance(patch, int) and patch > 8 else LARGEST_SIDE


def _heads(fields: dict[str, Any]) -> int:
    """Query heads of a configuration; 0 where it has none of its own, or other numbers in other stages."""
    names = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), 0)


def _layers(fields: dict[str, Any]) -> int:
    """Layers of a configuration; 0 where it has stages with numbers of their own."""
    if any(isinstance(fields.get(name), list | tuple) for name in ("depths", *COUNTS)):
        return 0
    return next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), 0)


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Weights as large as a trained model's, so that scores differ and masks, scales and biases show in the output."""
    torch.manual_seed(1)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            rows = 1 if id(parameter) in tables else max(1, math.prod(parameter.shape[1:]))
            parameter.normal_(0.0, rows**-0.5)
