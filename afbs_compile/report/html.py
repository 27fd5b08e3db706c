"""A recipe as ONE self-contained page: it asks for nothing from elsewhere and opens from a file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from importlib import resources
from typing import Any

from afbs_compile.recipe import Recipe, SiteRecipe
from afbs_compile.report.inspection import error_limit, policies, promise, provenance, reasons, speed, summary
from afbs_compile.report.masks import Masks

SCRIPTS = ("base.js", "heatmap.js", "charts.js", "main.js")
"""Parts of the page's script, each using only what stands above it or runs later."""


def page(recipe: Recipe, title: str, masks: Masks | None = None) -> str:
    """The page as HTML.

    Whatever comes from the recipe is escaped, and the page's policy lets no script run but its own.

    Args:
        recipe: what to show; title: e.g. its file's name.
        masks: block masks on a sample; without them the page says how to get them.
    """
    files = resources.files("afbs_compile.report").joinpath("page")
    script = "(() => {\n" + "".join(files.joinpath(name).read_text("utf-8") for name in SCRIPTS) + "})();"
    parts = {
        "title": escape(title),
        "lead": escape(_lead(recipe)),
        "style": files.joinpath("page.css").read_text("utf-8"),
        "script": script,
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "tiles": "\n".join(_tiles(recipe)),
        "promise": _list(promise(recipe)),
        "masks": _masks_note(masks),
        "calls": _calls(recipe),
        "reasons": _reasons(recipe),
        "provenance": _facts(provenance(recipe)),
        "data": _embedded(_data(recipe, masks)),
    }
    template = files.joinpath("page.html").read_text("utf-8")
    return re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], template)


def _data(recipe: Recipe, masks: Masks | None) -> dict[str, Any]:
    sites = [  # names are unique within a graph only
        {"graph": number, **_site(site)} for number, graph in enumerate(recipe.graphs) for site in graph.sites
    ]
    limit, name = error_limit(recipe)
    shown = None if masks is None else asdict(masks)
    return {"limit": limit, "limit_name": name, "sites": sites, "masks": shown}


def _site(site: SiteRecipe) -> dict[str, Any]:
    """A call as the page's script reads it: what was measured of each head beside its constants."""
    heads = [{**asdict(head), **site.calibrated.of_head(index)} for index, head in enumerate(site.heads)]
    blocks = None if site.call is None else str(site.call.shape).replace("x", " x ")
    return {"name": site.name, "outcome": site.outcome, "reason": site.reason, "blocks": blocks, "heads": heads}


def _embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _lead(recipe: Recipe) -> str:
    numbers = summary(recipe)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in numbers["outcomes"].items())
    return f"What was decided for {numbers['sites']} attention calls ({outcomes}) and {numbers['heads']} heads."


def _tiles(recipe: Recipe) -> Iterable[str]:
    numbers = summary(recipe)
    yield _tile("mean sparsity", f"{numbers['mean_sparsity']:.1%}", "of what runs")
    yield _tile("worst error", f"{numbers['worst_error']:.3f}", recipe.goal)
    yield _tile("sparse calls", str(numbers["outcomes"].get("sparse", 0)), f"of {numbers['sites']}")
    yield _tile("dense heads", str(numbers["dense_heads"]), f"of {numbers['heads']}")
    if numbers["attention_ms"]:
        dense, taken = numbers["attention_dense_ms"], numbers["attention_ms"]
        yield _tile("attention time", f"{dense / taken:.2f}x", f"{taken:.3g} ms, dense {dense:.3g} ms")


def _tile(label: str, value: str, note: str) -> str:
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"


def _list(sentences: Iterable[str]) -> str:
    return '<ul class="plain">' + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _facts(pairs: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in pairs.items())
    return f'<dl class="facts">{rows}</dl>'


def _masks_note(masks: Masks | None) -> str:
    if masks is None:
        return (
            '<p class="note">None here: a recipe holds thresholds, and which blocks they keep depends on the input. '
            "Give <code>--model MODEL --data SRC</code> to <code>inspect</code> to draw them on a sample.</p>"
        )
    head = (
        f'<p class="note">On the first sample of {escape(masks.source)}, {masks.tokens:,} tokens. Rows are blocks of '
    )
    head += 'queries, columns blocks of keys: <span class="swatch live"></span>computed, '
    head += '<span class="swatch skipped"></span>skipped.</p>'
    return head + (_list(masks.notes) if masks.notes else "")


def _calls(recipe: Recipe) -> str:
    several = len(recipe.graphs) > 1
    headers = [("graph", "")] if several else []
    headers += [("site", ""), ("outcome", "whole"), ("policy", ""), ("blocks", "whole")]
    headers += [(name, "number") for name in ("heads", "sparsity", "error", "dense ms", "sparse ms", "speed")]
    headers += [("kernel", ""), ("why not sparse", "")]
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in headers)
    rows = []
    for number, graph in enumerate(recipe.graphs):
        for site in graph.sites:
            cells = ([str(number)] if several else []) + _cells(site)
            columns = zip(headers, cells, strict=True)
            rows.append("<tr>" + "".join(_cell(name, kind, text) for (name, kind), text in columns) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(name: str, kind: str, text: str) -> str:
    if name == "site":
        return f'<th scope="row">{escape(text)}</th>'
    style = f"outcome {text}" if name == "outcome" else kind
    content = f'<span class="{style}">{escape(text)}</span>' if name == "outcome" else escape(text)
    return f'<td class="{kind}">{content}</td>'


def _cells(site: SiteRecipe) -> list[str]:
    if not site.heads:
        return [site.name, site.outcome, *[""] * 9, site.reason or ""]
    dense = sum(head.outcome == "dense" for head in site.heads)
    sparsity = f"{sum(head.sparsity for head in site.heads) / len(site.heads):.1%}"
    error = f"{max(head.error for head in site.heads):.3f}"
    ratio = speed(site)
    return [
        site.name,
        site.outcome,
        policies(site),
        f"{site.calibrated.shape.q} x {site.calibrated.shape.k}",
        f"{len(site.heads)}" + (f", {dense} dense" if dense else ""),
        sparsity if site.outcome == "sparse" else f"({sparsity})",
        error if site.outcome == "sparse" else f"({error})",
        *("" if ms is None else f"{ms:.3g}" for ms in (site.dense_ms, site.sparse_ms)),
        "" if ratio is None else f"{ratio:.2f}x",
        _kernel(site),
        site.reason or "",
    ]


def _kernel(site: SiteRecipe) -> str:
    """What computed the sparse call when it was timed, in brackets where the call stays dense all the same."""
    name = " ".join(part for part in (site.kernel, site.kernel_reason and f"({site.kernel_reason})") if part)
    return name if site.outcome == "sparse" or not name else f"({name})"


def _reasons(recipe: Recipe) -> str:
    if not (grouped := reasons(recipe)):
        return "<p>Every attention call is sparse.</p>"
    items = (
        f'<li><span class="outcome {outcome}">{outcome}</span>: {escape(reason)} '
        f'<span class="note">({escape(", ".join(names))})</span></li>'
        for (outcome, reason), names in grouped.items()
    )
    return '<ul class="plain">' + "".join(items) + "</ul>"
