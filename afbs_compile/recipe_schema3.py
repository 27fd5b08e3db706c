"""Recipes of version 0.1 (schema 3), whose calls were spread over sites and heads, as today's."""

from __future__ import annotations

from typing import Any

from afbs_compile.codec import DamagedError
from afbs_compile.errors import cut

VERSION = 3

PER_HEAD = ("tau", "theta", "lam", "policy")


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of schema 3 in today's form.

    Raises:
        DamagedError: something that such a file has is missing.
    """
    try:
        budget = data.get("budget")
        tolerance = data["tolerance"] if budget is None else {budget["quantity"]: budget["limit"]}
        options = {"tolerance": tolerance, "method": data["method"], "parameterization": data["parameterization"]}
        graphs = [{**graph, "sites": [_site(site) for site in graph["sites"]]} for graph in data["graphs"]]
        same = ("device", "engine", "predictor_version", "versions", "format")
        return {**{name: data[name] for name in same}, "options": options, "graphs": graphs, "budget": budget}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"it is of schema version {VERSION} and lacks something ({cut(str(error))})") from error


def _site(site: dict[str, Any]) -> dict[str, Any]:
    same = ("name", "outcome", "reason", "head_dim", "kv_heads", "dtype", "dense_ms", "sparse_ms", "validated_lengths")
    mask = None if site["causal"] is None else "causal" if site["causal"] else "full"
    return {
        **{name: site[name] for name in (*same, "kernel", "kernel_reason")},
        "mask": mask,
        "call": _call(site) if site["heads"] else None,
        "heads": [_head(head) for head in site["heads"]],
    }


def _call(site: dict[str, Any]) -> dict[str, Any]:
    heads = site["heads"]
    return {
        **{name: [head[name] for head in heads] for name in PER_HEAD},
        "precision": [head.get("precision", "own") for head in heads],
        "shape": [site["block_q"], site["block_k"]],
        "kept": [site.get("last_rows", 0), site.get("local_keys", 0)],
        "fp8_constants": site.get("fp8_constants", []),
        "min_length": site["min_length"] or 0,
    }


def _head(head: dict[str, Any]) -> dict[str, Any]:
    paths = [{"shape": [path.pop("block_q"), path.pop("block_k")], **path} for path in map(dict, head["search"])]
    same = {name: value for name, value in head.items() if name not in (*PER_HEAD, "precision", "search")}
    return {**same, "search": paths}
