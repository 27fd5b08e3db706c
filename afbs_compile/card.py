"""The page that goes with a recipe on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = """---
library_name: afbs-compile
tags:
- sparse-attention
- afbs-recipe
---

# Sparse attention recipe

Thresholds of [afbs_compile](https://pypi.org/project/afbs-compile/) for the attention calls of one model. Use them with

```python
import torch, afbs_compile

recipe = afbs_compile.Recipe.from_pretrained("{name}")
model = torch.compile(model, backend="afbs", options={{"recipe": recipe}})
```

A recipe belongs to the weights it was calibrated on: another form of them is checked on the first inputs, other
weights are refused.
"""

COLUMNS = ("call", "outcome", "heads", "sparsity", "largest error", "reason")


def card(name: str, facts: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> str:
    """The page as Markdown.

    Args:
        name: of the repository; facts: lines for a list.
        records: a head each, as :meth:`afbs_compile.Recipe.to_records` gives them.
    """
    calls: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for record in records:
        calls.setdefault((record["graph"], record["site"]), []).append(record)
    lines = [HEAD.format(name=name), *(f"- {what}: {value}" for what, value in facts.items()), ""]
    lines += [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    lines += [_row(_cells(site, heads)) for (_, site), heads in calls.items()]
    return "\n".join(lines) + "\n"


def _cells(site: str, heads: Sequence[Mapping[str, Any]]) -> list[str]:
    sparsity = sum(head["sparsity"] for head in heads) / len(heads)
    error = max(head["error"] for head in heads)
    first = heads[0]
    reason = first["site_reason"] or ""
    return [f"`{site}`", first["site_outcome"], str(len(heads)), f"{sparsity:.1%}", f"{error:.3f}", reason]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
