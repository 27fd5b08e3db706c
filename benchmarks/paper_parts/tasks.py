"""RULER's synthetic tasks (Hsieh et al. 2024), written anew as generators of prompts that end with their answer.

Sentences are those that the shipped models know from their training where there are such: "The pass key is ...".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

NAMES = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Henry")
WORDS = (
    "apple", "river", "stone", "cloud", "table", "horse", "light", "paper", "garden", "music", "winter",
    "bridge", "silver", "letter", "candle", "window", "forest", "ocean", "mirror", "engine", "basket",
    "feather", "harbor", "island", "jacket", "kettle", "ladder", "meadow", "needle", "orange",
)  # fmt: skip
KEYS = 4
"""Of tasks with several."""


@dataclass(frozen=True)
class Facts:
    """What a prompt hides and asks for.

    Attributes:
        hidden: sentences, in order; question: at the end; answer: what follows it.
        fills: whether the sentences are the whole text, again and again, instead of a haystack.
    """

    hidden: tuple[str, ...]
    question: str
    answer: str
    fills: bool = False


def _key(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=5))


def pass_key(draw: random.Random) -> Facts:
    """One needle."""
    key = _key(draw)
    return Facts((f"\n\nThe pass key is {key}. Remember it.\n\n",), "\n\nWhat is the pass key? The pass key is ", key)


def several_keys(draw: random.Random) -> Facts:
    """Needles of several people, one of whom is asked for."""
    names, keys = draw.sample(NAMES, KEYS), [_key(draw) for _ in range(KEYS)]
    hidden = tuple(f"\n\nThe pass key of {n} is {k}. Remember it.\n\n" for n, k in zip(names, keys, strict=True))
    asked = draw.randrange(KEYS)
    return Facts(hidden, f"\n\nWhat is the pass key of {names[asked]}? The pass key of {names[asked]} is ", keys[asked])


def several_values(draw: random.Random) -> Facts:
    """Needles of one kind, all of which are asked for, in order."""
    keys = [_key(draw) for _ in range(KEYS)]
    hidden = tuple(f"\n\nThe pass key is {key}. Remember it.\n\n" for key in keys)
    return Facts(hidden, "\n\nWhat are the pass keys? The pass keys are ", ", ".join(keys))


def variables(draw: random.Random) -> Facts:
    """A chain of assignments; the value of the last one is asked for."""
    names, value = draw.sample("ABCDEFGHKLMNPQRSTUVWXYZ", KEYS), _key(draw)
    hidden = [f"\n\nVAR {names[0]} = {value}.\n\n"]
    hidden += [f"\n\nVAR {new} = VAR {old}.\n\n" for old, new in pairwise(names)]
    return Facts(tuple(hidden), f"\n\nWhat is VAR {names[-1]}? VAR {names[-1]} = ", value)


def common_words(draw: random.Random) -> Facts:
    """A list of words of which one comes three times as often as any other."""
    words = draw.sample(WORDS, 12)
    text = words[:1] * 30 + [word for word in words[1:] for _ in range(10)]
    draw.shuffle(text)
    return Facts((" " + " ".join(text),), "\n\nThe most common word is", f" {words[0]}", fills=True)


def frequent_words(draw: random.Random) -> Facts:
    """Words as often as 1 / rank: the three most frequent are asked for, in order."""
    words = draw.sample(WORDS, 12)
    text = [word for rank, word in enumerate(words, 1) for _ in range(60 // rank)]
    draw.shuffle(text)
    return Facts(
        (" " + " ".join(text),), "\n\nThe three most frequent words are", " " + " ".join(words[:3]), fills=True
    )


TASKS: dict[str, Callable[[random.Random], Facts]] = {
    "pass key": pass_key,
    "several keys": several_keys,
    "several values": several_values,
    "variable tracking": variables,
    "common word": common_words,
    "frequent words": frequent_words,
}


def prompt(
    tokenizer: Any, haystack: Sequence[int], facts: Facts, length: int, places: Sequence[float]
) -> tuple[Tensor, int]:
    """Tokens ``[1, length]`` that end with the answer, and how many tokens that has.

    Args:
        tokenizer: of the model; haystack: tokens of any text, at least ``length``; facts: to hide.
        places: of the sentences, from 0 (the beginning) to 1.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    hidden, question, answer = [encode(text) for text in facts.hidden], encode(facts.question), encode(facts.answer)
    room = length - 1 - len(question) - len(answer)
    if facts.fills:
        text = (hidden[0] * (room // len(hidden[0]) + 1))[:room]
    else:
        text = list(haystack[: room - sum(map(len, hidden))])
        for place, tokens in sorted(zip(places, hidden, strict=True), key=lambda pair: pair[0], reverse=True):
            at = round(place * (room - sum(map(len, hidden))))
            text[at:at] = tokens
    return torch.tensor([[tokenizer.bos_token_id, *text, *question, *answer]]), len(answer)
