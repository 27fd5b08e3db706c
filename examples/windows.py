"""Text that every Python has, and windows of tokens cut from it: what the examples calibrate and test on."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHIPPED_MODEL = Path(__file__).parent / "model-7m"


def help_topics() -> str:
    """The text of Python's own help."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def windows(tokenizer: Any, texts: str | Sequence[str], length: int, count: int) -> list[Tensor]:
    """``count`` disjoint windows of token ids ``[1, length]``, spread over the texts."""
    joined = texts if isinstance(texts, str) else "\n\n".join(texts)
    tokens = torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False).input_ids)
    if len(tokens) < length * count:
        raise SystemExit(f"the text has {len(tokens)} tokens, too few for {count} windows of {length}")
    starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
    return [tokens[None, start : start + length].contiguous() for start in starts]
