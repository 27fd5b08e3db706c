"""Your own module, your own arguments, your own data.

    python examples/own_model.py                    embeds the sources of Python's standard library
    python examples/own_model.py --data FOLDER      embeds the text files of a folder

The module below is what a user's code looks like: a backbone, pooling of one's own, and a forward with arguments of
one's own. Nothing in it knows about afbs_compile; it is calibrated on a few inputs and compiled. Takes a few minutes
on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from windows import SHIPPED_MODEL, windows

import afbs_compile

CALIBRATION, UNSEEN = 3, 3


class Embedder(nn.Module):
    """Turns a text into one unit vector: a weighted mean of a language model's last hidden states."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Embed ``tokens [B, N]`` with ``weights [B, N]``; returns ``[B, D]``."""
        hidden = self.backbone(input_ids=tokens, use_cache=False).last_hidden_state
        return F.normalize((hidden * weights[..., None]).sum(1), dim=-1)


def recency(tokens: Tensor) -> Tensor:
    """Weights that grow with the position: a causal model has read more where it is later."""
    return torch.linspace(0, 1, tokens.shape[1]).expand(tokens.shape)


def read(folder: Path) -> list[str]:
    """The text files of a folder."""
    files = sorted(path for suffix in ("*.py", "*.txt", "*.md") for path in folder.glob(suffix))
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


@torch.no_grad()
def main(folder: Path, model: str | Path = SHIPPED_MODEL, length: int = 2048, min_length: int = 1024) -> list[float]:
    """Calibrate on some texts, compile, compare on others; returns the cosines that are printed."""
    embedder = Embedder(AutoModel.from_pretrained(model, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    cut = windows(tokenizer, read(folder), length, CALIBRATION + UNSEEN)
    inputs = [{"tokens": tokens, "weights": recency(tokens)} for tokens in cut]
    calibration, unseen = inputs[::2], inputs[1::2]  # in turns, so that both are spread over the texts

    recipe = afbs_compile.calibrate(embedder, calibration, min_length=min_length)
    sparse = torch.compile(embedder, backend="afbs", options={"recipe": recipe, "min_length": min_length})
    cosines = [float((sparse(**one) * embedder(**one)).sum()) for one in unseen]
    print(afbs_compile.explain(sparse))
    print(f"cosine of sparse and dense embeddings of {len(unseen)} unseen texts: {[round(c, 5) for c in cosines]}")
    print(f"mean {statistics.mean(cosines):.5f}; 1 is the same vector")
    return cosines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(json.__file__).parents[1], help="folder of text files")
    parser.add_argument("--model", default=SHIPPED_MODEL, help="folder or id of the backbone")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    given = parser.parse_args()
    main(given.data, given.model, given.length)
