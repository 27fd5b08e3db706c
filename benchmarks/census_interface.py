"""``attn_implementation="afbs"`` over every architecture of transformers: is any output wrong, does any model crash?

    python benchmarks/census_interface.py --workers 8
    python benchmarks/census_interface.py --models llama mistral --forms padded

The models and inputs are those of census.py. A model runs as it is made, then switched to "afbs" with every call that
the interface hands over computed by the sparse engine over all blocks; both must agree to 1e-3 of the largest number.
A model that cannot be switched, or makes no call, is counted as such.
"""

from __future__ import annotations

import argparse
import copy
import functools
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from census import FORMS, records
from census_check import TOLERANCE, NotRunError, _called, _inputs, _said, difference, running
from census_models import architectures
from common import RESULTS, save, settings

import afbs_compile.integrations.transformers as afbs
from afbs_compile.integrations.served import ServedModel, served_model
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.operands import Operands

KEEP = 0.9999999
"""A tau that keeps every block and is not what stands for a dense head."""


def examine(model_type: str, forms: list[str]) -> dict[str, Any]:
    """The record of one architecture."""
    torch.set_num_threads(1)
    try:
        _, model, make = running(model_type)
    except NotRunError as error:
        return {"not_run": str(error)}
    record: dict[str, Any] = {"forms": {}}
    for form in forms:
        if form != "alone" and "input_ids" not in make(1):
            continue
        try:
            record["forms"][form] = _form(model, *_inputs(form, make))
        except NotRunError as error:
            record["forms"][form] = {"not_run": str(error)}
    return record


def _form(model: Any, inputs: dict[str, torch.Tensor], visible: torch.Tensor | None) -> dict[str, Any]:
    try:
        expected = _called(model, inputs)
    except Exception as error:
        raise NotRunError(_said(error)) from error
    switched = copy.deepcopy(model)
    masks: Counter[str] = Counter()

    def keep_all(self: ServedModel, name: str, operands: Operands) -> SparseCall:
        kind = str(operands.mask).partition("(")[0]
        extras = [part for part in ("valid", "attn_mask", "sinks") if getattr(operands, part) is not None]
        masks[" + ".join([kind, *extras, *(["softcap"] if operands.softcap else [])])] += 1
        return SparseCall.uniform(operands.heads, KEEP, shape=BlockShape(32, 16))

    try:
        afbs.use(switched, min_length=16)
        with mock.patch.object(ServedModel, "_call", keep_all):
            found = _called(switched, inputs)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"crash": f"{_said(error)} ({Path(place.filename).name}:{place.lineno})"}
    error = functools.partial(difference, visible=visible, decoder="decoder_input_ids" in inputs)(expected, found)
    served = served_model(switched)
    refused = Counter(row.reason for row in served.rows) if served is not None else Counter()
    return {"calls": dict(masks), "refused": dict(refused), "error": error}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records say together."""
    table: dict[str, Any] = {}
    lists: dict[str, list[str]] = {"wrong": [], "crashes": [], "not run": []}
    for form in FORMS:
        results = [(r["model"], r["forms"][form]) for r in found if form in r.get("forms", {})]
        kinds, refused = Counter[str](), Counter[str]()
        for model, result in results:
            if "crash" in result:
                lists["crashes"].append(f"{model}, {form}: {result['crash']}")
            elif "not_run" in result:
                lists["not run"].append(f"{model}, {form}: {result['not_run']}")
            else:
                kinds.update(result["calls"])
                refused.update({str(reason).split(":")[0]: n for reason, n in result["refused"].items()})
                if result["error"] > TOLERANCE:
                    lists["wrong"].append(f"{model}, {form}: {result['error']:.1e}")
        ran = [result for _, result in results if "calls" in result]
        table[form] = {
            "models run": len(ran),
            "with calls": sum(bool(result["calls"]) for result in ran),
            "calls": sum(kinds.values()),
            "by mask": dict(kinds.most_common()),
            "refused": dict(refused.most_common()),
        }
    lists["not run"] += [f"{r['model']}: {r['not_run']}" for r in found if "not_run" in r]
    return {"models": len(found), "forms": table, **lists}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="model types; all by default")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--workers", type=int, default=2, help="models at a time, a thread each")
    parser.add_argument("--seconds", type=int, default=60, help="of a processor that a model may take")
    parser.add_argument("--out", type=Path, default=RESULTS / "census_interface_cpu.json")
    arguments = parser.parse_args()
    models = arguments.models or sorted(architectures())
    found = []
    for record in records(models, arguments.forms, arguments.workers, arguments.seconds, examine):
        found.append(record)
        bad = [str(r.get("crash") or r["error"]) for r in record.get("forms", {}).values() if _is_bad(r)]
        print(f"{len(found):4} {record['model']}", *bad, sep="\n     ", flush=True)
    result = summary(sorted(found, key=lambda record: record["model"]))
    for form, row in result["forms"].items():
        print(form, row)
    for name in ("wrong", "crashes", "not run"):
        print(f"{name}: {len(result[name])}", *result[name], sep="\n    ")
    save(arguments.out.stem, arguments.out.parent, {"settings": settings(arguments), **result})


def _is_bad(result: dict[str, Any]) -> bool:
    return "crash" in result or result.get("error", 0.0) > TOLERANCE


if __name__ == "__main__":
    main()
