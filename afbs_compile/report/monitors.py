"""The public :func:`monitors`: what watches a model that runs with the option ``monitor``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from afbs_compile.integrations.served import served_model
from afbs_compile.monitor.monitor import Monitor
from afbs_compile.passes.place import owner_of
from afbs_compile.regions import rows_of
from afbs_compile.report.compiled import graphs_compiled_of, original_of


def monitors(model: Callable[..., Any]) -> tuple[Monitor, ...]:
    """What watches the sparse calls of a model, one for each of its graphs.

    Each has ``alarms``, ``to_records()``, ``to_dict()`` and ``to_prometheus()``, and ``recalibrate()``.

    Args:
        model: what ``torch.compile(model, backend="afbs", options={"monitor": ...})`` returned, or a module compiled in
            place, or a model whose library calls us (``attn_implementation="afbs"``), after a first call.

    Returns:
        None of them where the option was not given, or no call is sparse.

    Raises:
        TypeError: the argument is no such model.
    """
    served = served_model(model)
    if served is not None:
        return () if served.monitor is None else (served.monitor,)
    found = [graph.monitor for graph in graphs_compiled_of(model)]
    found += [served.monitor for served, _ in rows_of(owner_of(original_of(model)))]
    return tuple(dict.fromkeys(monitor for monitor in found if monitor is not None))
