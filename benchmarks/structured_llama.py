"""Llamas of any shape with random weights whose attention is structured, on one device or in shards on several.

Plain random weights give attention that is nearly uniform, which no method can skip. Here the embedding of a token has
a direction that all tokens share, one of its topic, and noise; the first token has a direction of its own. Projections
read them, each head in a mixture of its own:

- *near keys*: the shared direction makes queries and keys constant vectors before RoPE, whose products then depend on
  the distance alone: attention falls as a power of it, with an exponent of 0.7 to 2, as in many trained heads.
- *a sink*: queries look for the first token's direction, in the pairs of dimensions that RoPE hardly turns.
- *content*: keys of the query's topic score higher. Topics change every 256 tokens and come back.
- *noise* of about a unit in each score. Values hold topic and noise; what a sink holds is nearly nothing.

Sublayers add a quarter to the energy of the embedding, all together, so all layers see the structure. Sparsity is
what calibration finds in it (73 % at 8,192 tokens, 40m): a property of this construction, not of any trained model.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import common  # noqa: F401  # before transformers
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

TOPICS, STRETCH = 48, 256
SHARED, SINK, FIRST_TOPIC = 0, 1, 2
"""Coordinates of the hidden states; the topics' follow, and noise after them."""

NEAR, CONTENT = 5 / 8, 2 / 8
"""Shares of the pairs of dimensions, from those that RoPE turns most; the rest is for sinks."""

EXPONENTS, CONTENTS, SINKS = (0.7, 2.0), (0.0, 4.0), (0.0, 6.0)
"""Least and greatest exponent of the distance, and score, of the heads of a model."""

NOISE = 0.7
"""Standard deviation of the noise in scores, but for what it makes with the constant vectors."""

THETA = 500_000.0

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.heads * self.head_dim

    def config(self) -> LlamaConfig:
        """The same for transformers."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=2**17,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=False,
            use_cache=False,
        )


SHAPES = {
    "tiny": Shape(2, 4, 2, 32, 96, 512),
    "40m": Shape(12, 8, 4, 64, 1408, 8192),
    "8b": Shape(32, 32, 8, 128, 14336, 128256),
}
"""``8b`` is the shape of Llama 3 8B."""


@torch.no_grad()
def structured_llama(
    shape: Shape, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None = None, seed: int = 0
) -> LlamaForCausalLM:
    """A model made on its device; with a mesh, this process's shards of the same one, by tensor parallelism.

    Each weight is drawn whole, one at a time, and this process keeps its part: all processes, and a model in one piece,
    have the same numbers.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config()).to(dtype).eval()
    if mesh is not None:
        plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        _keep(parameter, _drawn(name, parameter.shape, shape, generator).to(dtype))
    return model


def token_ids(shape: Shape, length: int, seed: int, device: torch.device) -> Tensor:
    """``[1, length]``: the first token, then stretches of tokens of one topic each."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(TOPICS, (-(-length // STRETCH),), generator=generator).repeat_interleave(STRETCH)[:length]
    each = (shape.vocabulary - 1) // TOPICS
    ids = 1 + topics + TOPICS * torch.randint(each, (length,), generator=generator)
    ids[0] = 0
    return ids[None].to(device)


def _keep(parameter: nn.Parameter, whole: Tensor) -> None:
    """Put a weight, or this process's part of it, where it belongs."""
    if isinstance(parameter, DTensor):  # each process has drawn it: nothing is sent
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        parameter.to_local().copy_(whole)
    else:
        parameter.copy_(whole)


def _drawn(name: str, size: torch.Size, shape: Shape, generator: torch.Generator) -> Tensor:
    """A whole weight, float32."""

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=generator, device=generator.device)

    kind = name.split(".")[-2]
    fan_in = size[-1]
    if "norm" in kind:
        return torch.ones(size, device=generator.device)
    if kind == "embed_tokens":
        return _embedding(normal(*size))
    if kind in ("q_proj", "k_proj"):
        layer = int(name.split(".")[2])
        return _query_or_key(kind, normal(*size), shape, layer, generator.device)
    weight = normal(*size) / math.sqrt(fan_in)
    if kind == "v_proj":
        weight[:, [SHARED, SINK]] = 0
    if kind in ("o_proj", "down_proj"):
        weight *= 0.5 / math.sqrt(shape.layers)
    return weight


def _embedding(noise: Tensor) -> Tensor:
    """Rows of norm ``sqrt(hidden)``: a quarter of the energy is shared, a quarter the topic's, half is noise."""
    vocabulary, hidden = noise.shape
    noise *= math.sqrt(0.5)
    noise[:, : FIRST_TOPIC + TOPICS] = 0
    noise[:, SHARED] = math.sqrt(hidden / 4)
    rows = torch.arange(1, vocabulary, device=noise.device)
    noise[rows, FIRST_TOPIC + (rows - 1) % TOPICS] = math.sqrt(hidden / 4)
    noise[0, SHARED + 1 :] = 0
    noise[0, SINK] = math.sqrt(3 * hidden / 4)
    return noise


def _query_or_key(kind: str, noise: Tensor, shape: Shape, layer: int, device: torch.device) -> Tensor:
    """The projection to queries or keys, ``[heads * head_dim, hidden]``; its noise is standard normal."""
    dim, hidden = shape.head_dim, shape.hidden
    pairs = dim // 2
    near, content = round(NEAR * pairs), round(CONTENT * pairs)
    slowest = THETA ** (-near / pairs)
    heads, size = noise.shape[0] // dim, dim**0.25  # of either factor of a scaled score
    weight = (noise * math.sqrt(NOISE / (hidden / 2))).view(heads, dim, hidden)
    weight[:, :, : FIRST_TOPIC + TOPICS] = 0
    generator = torch.Generator().manual_seed(layer)  # heads of queries and of keys share what follows
    mixture = torch.rand(3, shape.heads, generator=generator)
    exponent, score, sink = (
        low + (high - low) * share for (low, high), share in zip((EXPONENTS, CONTENTS, SINKS), mixture, strict=True)
    )
    directions = torch.randn(shape.kv_heads, TOPICS, 2 * content, generator=generator)
    directions = nn.functional.normalize(directions, dim=-1)
    if kind == "q_proj":
        directions = directions.repeat_interleave(heads // shape.kv_heads, 0) * score[:, None, None]
    else:
        exponent, sink = torch.full((heads,), near / -math.log(slowest)), torch.ones(heads)
    unit = 2 * size / math.sqrt(hidden)
    strength = exponent * -math.log(slowest) / near
    weight[:, :near, SHARED] = (unit * strength[:, None]).to(device)
    turned = (unit * directions.mT).to(device)
    topics = slice(FIRST_TOPIC, FIRST_TOPIC + TOPICS)
    weight[:, near : near + content, topics] = turned[:, :content]
    weight[:, pairs + near : pairs + near + content, topics] = turned[:, content:]
    last = slice(near + content, pairs)
    if kind == "q_proj":
        weight[:, last, SHARED] = (unit * sink[:, None] / (pairs - near - content)).to(device)
    else:
        weight[:, last, SINK] = size / math.sqrt(3 * hidden / 4)
    return weight.reshape(heads * dim, hidden)
