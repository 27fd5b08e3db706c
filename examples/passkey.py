"""Passkey retrieval: can the model still find a number that it read thousands of tokens ago?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NEEDLE = "\n\nThe pass key is {key}. Remember it.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "


def prompts(
    tokenizer: Any, filler: Sequence[int], length: int, count: int, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Prompts of exactly ``length`` tokens that end with the answer.

    Args:
        tokenizer: of the model; filler: tokens of any text, at least ``length`` of them.
        length: tokens of a prompt with its answer; count: prompts, with the key at evenly spread depths.

    Returns:
        ``(ids [1, length], answer [n])`` pairs; the answer is the last ``n`` tokens of the ids.
    """
    draw = random.Random(seed)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    made = []
    for index in range(count):
        key = "".join(draw.choices("0123456789", k=5))
        needle, question, answer = encode(NEEDLE.format(key=key)), encode(QUESTION), encode(key)
        room = length - 1 - len(needle) - len(question) - len(answer)
        depth = round(room * (index + 0.5) / count)
        start = draw.randrange(len(filler) - room + 1)
        text = filler[start : start + room]
        ids = [tokenizer.bos_token_id, *text[:depth], *needle, *text[depth:], *question, *answer]
        made.append((torch.tensor([ids]), torch.tensor(answer)))
    return made


@torch.no_grad()
def recall(model: Callable[..., Any], tests: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of prompts whose every answer token is the model's first choice (greedy decoding gives the key)."""
    right = 0
    for ids, answer in tests:
        logits = model(ids).logits[0, -1 - len(answer) : -1]
        right += bool((logits.argmax(-1).cpu() == answer).all())
    return right / len(tests)
