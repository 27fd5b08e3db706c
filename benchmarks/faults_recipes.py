"""Recipes made wrong, one mutation after the other, and what a loaded one must hold whatever was done to its file."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from afbs_compile import Recipe, explain
from afbs_compile.errors import RecipeError
from afbs_compile.found import FoundGraph
from afbs_compile.plan import Plan
from afbs_compile.report.html import page
from afbs_compile.report.inspection import print_inspection, summary

MOST_CHARACTERS = 600
"""Of a refusal, its file's name included."""

SLOWEST = 10.0
"""Seconds that a file may take to be refused or read."""

VALUES: tuple[str, ...] = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "-1", "-0.5", "1.5", "50", "640", "1e9", "-1e9", "1e30"),
    *("1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 5000, str(2**63), str(-(2**31)), "0", "1", "0.0", "1.0", "true"),
    *("null", '""', '"sparse"', '"dense"', '"refused"', '"fp8"', '"window(0)"', '"window(99999999999999999999)"'),
    *(
        '"chunk(-1)"',
        '"causal"',
        r'"\ud800"',
        r'"a\u0000b"',
        '"[/b] {0} %s </script>"',
        '"' + "x" * 200_000 + '"',
        "[]",
        "{}",
        "[[]]",
        "[1, 2]",
    ),
    *("[" * 1000 + "]" * 1000, '{"a":' * 1000 + "1" + "}" * 1000, "[" * 100_000 + "]" * 100_000),
)
"""JSON that takes another value's place."""

Steps = tuple[Any, ...]


def leaves(value: Any, at: Steps = ()) -> Iterator[Steps]:
    """The way to every value of a JSON document, containers included."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*at, key))


def place(rng: random.Random, data: Any) -> Steps:
    """A place in the document: each level's entries are equally likely, so that long lists do not take all."""
    at: Steps = ()
    while True:
        if isinstance(data, dict) and data:
            key = rng.choice(sorted(data))
        elif isinstance(data, list) and data:
            key = rng.randrange(len(data))
        else:
            return at
        at, data = (*at, key), data[key]
        if at and rng.random() < 0.15:
            return at


def holder(data: Any, at: Steps) -> Any:
    """What holds the value at a place."""
    for key in at[:-1]:
        data = data[key]
    return data


def with_value(rng: random.Random, data: Any) -> str:
    """Another value in a place, some of which no Python object stands for."""
    at, mark = place(rng, data), "@here@"
    holder(data, at)[at[-1]] = mark
    return json.dumps(data).replace(f'"{mark}"', rng.choice(VALUES), 1)


def with_nudge(rng: random.Random, data: Any) -> str:
    """A number scaled, shifted or with another sign."""
    numbers = [at for at in leaves(data) if type(holder(data, at)[at[-1]]) in (int, float)]
    at = rng.choice(numbers)
    value = holder(data, at)[at[-1]]
    change: Callable[[Any], Any] = rng.choice(
        (lambda x: -x, lambda x: x * 1000, lambda x: x + 1, lambda x: x - 1, lambda x: -x - 1, lambda x: x / 3)
    )
    holder(data, at)[at[-1]] = change(value)
    return json.dumps(data)


def with_structure(rng: random.Random, data: Any) -> str:
    """Something left out, added, repeated, reversed, or exchanged with something else."""
    at = place(rng, data)
    inside, key = holder(data, at), at[-1]
    kind = rng.randrange(5)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, list):
        inside.insert(key, copy.deepcopy(inside[key]))
    elif kind == 2 and isinstance(inside[key], list):
        inside[key].reverse()
    elif kind == 3:
        other = place(rng, data)
        if at[: len(other)] != other and other[: len(at)] != at:
            there = holder(data, other)
            inside[key], there[other[-1]] = there[other[-1]], inside[key]
    elif isinstance(inside, dict):
        inside[rng.choice(("extra", "tau", "sha256", ""))] = inside[key]
    return json.dumps(data)


def with_bytes(rng: random.Random, text: str) -> bytes:
    """Bytes changed, cut off, cut out, put in or repeated."""
    content = bytearray(text.encode())
    at = rng.randrange(len(content))
    kind = rng.randrange(6)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + rng.randrange(1, 2000)]
    elif kind == 3:
        content[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == 4:
        content[at:at] = content[at : at + rng.randrange(1, 400)]
    else:
        content = bytearray(rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b""))) + content * rng.randrange(3)
    return bytes(content)


def mutated(rng: random.Random, text: str) -> bytes:
    """A recipe's text made wrong in one or two ways."""
    kind = rng.choices((with_value, with_nudge, with_structure, None), (4, 2, 2, 2))[0]
    if kind is None:
        return with_bytes(rng, text)
    if rng.random() < 0.2:
        first = rng.choice((with_nudge, with_structure))
        text = first(rng, json.loads(text))
    return kind(rng, json.loads(text)).encode()


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def nonsense(recipe: Recipe) -> str | None:
    """What a loaded recipe says that cannot be; written without the package's own checks."""
    numbers = list(_numbers(asdict(recipe)))
    if not all(math.isfinite(x) if isinstance(x, float) else abs(x) < 2**63 for x in numbers):
        return "a number is not finite, or does not fit 64 bits"
    if recipe.budget is None and not 0 < (recipe.tolerance or 0) < 1:
        return "the tolerance is no share"
    for graph in recipe.graphs:
        if not 0 <= graph.samples.lengths[0] <= graph.samples.lengths[1]:
            return "lengths of the samples are negative or reversed"
        if graph.promise and not all(0 <= x <= 1 for x in (graph.promise.head_bound, graph.promise.model_bound)):
            return "a chance is no share"
        if graph.seconds < 0 or graph.evaluations < 0:
            return "time is negative"
    for site in recipe.sites:
        if site.outcome == "refused":
            continue
        call = site.calibrated
        if (site.heads and not call.heads) or len(site.heads) != call.heads:
            return "heads without constants"
        if call.shape.q not in (16, 32, 64, 128) or call.shape.k not in (16, 32, 64, 128):
            return "blocks of another size"
        if min(call.kept) < 0 or max(call.kept) > 2**40 or not 0 <= call.min_length < 2**40:
            return "kept rows or lengths out of range"
        if site.validated_lengths and not 1 <= site.validated_lengths[0] <= site.validated_lengths[1]:
            return "validated lengths are negative or reversed"
        if not site.kv_heads or not site.head_dim or min(site.kv_heads, site.head_dim) < 1:
            return "no key heads, or heads without a size"
        if call.heads % site.kv_heads:
            return "query heads that share no key heads"
        for head, tau, theta, policy in zip(site.heads, call.tau, call.theta, call.policy, strict=True):
            if (head.outcome == "dense") != (tau >= 1):
                return "a head is dense and its threshold is not, or the other way round"
            if head.error < 0 or min(head.validation_errors, default=0) < 0:
                return "an error is negative"
            if not 0 <= head.sparsity <= 1 or not 0 <= tau <= 1 or theta > 1:
                return "sparsity, tau or theta is no share"
            if theta >= 0 and policy != "meansim":
                return "theta on a policy without one"
            if abs(head.length_exponent) > 2 or not 0 <= head.tau_exponent <= 4:
                return "an exponent that no fit gives"
    return None


def use(recipe: Recipe, found: FoundGraph) -> None:
    """Do with a loaded recipe what is done with recipes; a refusal is an answer, too.

    Args:
        recipe: loaded; found: a graph that it may be for.
    """
    said = [str(explain(recipe)), page(recipe, "recipe.json"), json.dumps([summary(recipe), recipe.to_records()])]
    print_inspection(recipe, Console(file=io.StringIO(), width=100))
    "".join(said).encode()
    for outside in ("extrapolate", "dense"):
        try:
            Plan.of(found, recipe, outside)
        except RecipeError as error:
            _check_sentence(str(error))


def _check_sentence(sentence: str) -> None:
    sentence.encode()
    if len(sentence) > MOST_CHARACTERS or len(sentence.splitlines()) != 1:
        raise AssertionError(f"a sentence of {len(sentence)} characters, {len(sentence.splitlines())} lines")


def tried(path: Path, found: FoundGraph) -> tuple[str, str]:
    """What a file leads to: ``"refused"``, ``"loaded"``, or what is wrong about it; and how it was said."""
    began = time.monotonic()
    try:
        recipe = Recipe.load(path)
    except RecipeError as error:
        try:
            _check_sentence(str(error))
        except (AssertionError, UnicodeError) as wrong:
            return "unbounded sentence", str(wrong)
        slow = time.monotonic() - began > SLOWEST
        return ("slow" if slow else "refused"), str(error)
    except Exception as error:
        return "exception", f"{type(error).__name__}: {error}"[:200]
    wrong = nonsense(recipe)
    if wrong is not None:
        return "nonsense", wrong
    try:
        use(recipe, found)
        again = path.with_suffix(".again")
        recipe.save(again)
        if Recipe.load(again) != recipe:
            return "nonsense", "it is another one after it was saved"
    except Exception as error:
        return "exception", f"in use, {type(error).__name__}: {error}"[:200]
    return "loaded", ""


def campaign(texts: list[str], found: FoundGraph, folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Load many wrong files.

    Args:
        texts: recipes to begin with; found: the graph of one of them; folder: to write into.
        count: mutations; seed: of the choice.

    Returns:
        How often each outcome came; every one but ``"refused"`` and ``"loaded"`` is printed with what was done.
    """
    rng, outcomes = random.Random(seed), Counter[str]()
    path = folder / "mutated.json"
    for number in range(count):
        path.write_bytes(mutated(rng, rng.choice(texts)))
        outcome, said = tried(path, found)
        outcomes[outcome] += 1
        if outcome not in ("refused", "loaded"):
            print(f"mutation {number}: {outcome}: {said}", flush=True)
    return outcomes
