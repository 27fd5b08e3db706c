"""Reasons why calls stay dense, as few clauses as they need: those that differ by numbers alone are one."""

from __future__ import annotations

import re
from collections.abc import Iterable

NO_MEMORY = "not calibrated: out of memory; calibrate on fewer or shorter samples, or name a recipe"

NONE_FOUND = (
    "no attention call was found (scaled_dot_product_attention, varlen_attn, or softmax(q @ k.T) @ v written out is "
    "looked for)"
)

EXPECTED = ("too short", "decoding")
"""Kinds of reasons for which a call stays dense by design."""

NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?!\w)")
"""A number by itself: not that of a name such as bf16."""


def grouped(reasons: Iterable[str | None]) -> str:
    """``"7 x not faster: 164 to 165 ms sparse, 2.1 ms dense; 1 x too short: ..."``, in order of first appearance."""
    groups: dict[str, list[list[str]]] = {}
    for reason in reasons:
        text = reason or ""
        groups.setdefault(NUMBER.sub("{}", text.replace("{", "{{").replace("}", "}}")), []).append(NUMBER.findall(text))
    return "; ".join(
        f"{len(numbers)} x {pattern.format(*(_range(place) for place in zip(*numbers, strict=True)))}"
        for pattern, numbers in groups.items()
    )


def _range(numbers: tuple[str, ...]) -> str:
    ordered = sorted(set(numbers), key=lambda number: float(number.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
