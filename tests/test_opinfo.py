"""PyTorch's own samples of ``scaled_dot_product_attention``: every one is rewritten or refused, and none is wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from afbs_compile.passes import rules
from tests.passes.conftest import compiled, select_everything

invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")


def samples(dtype: torch.dtype) -> list[Any]:
    (info,) = [info for info in invocations.op_db if info.name == "nn.functional.scaled_dot_product_attention"]
    torch.manual_seed(0)
    return list(info.sample_inputs("cpu", dtype, requires_grad=False))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_samples_are_rewritten_or_refused_and_none_is_wrong(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "FEWEST_ROWS", 1)  # the samples have three to eight rows
    outcomes: Counter[str] = Counter()
    for sample in samples(dtype):
        q, (k, v), options = sample.input, sample.args, dict(sample.kwargs)
        mask = options.pop("attn_mask", None)

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any] = options) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

        try:
            expected = call(q, k, v, mask)
        except RuntimeError:
            outcomes["PyTorch refuses it"] += 1
            continue
        found = compiled(call, change=True, call=select_everything)
        torch.manual_seed(1)
        out = found.call(q, k, v, mask)
        if found.sites[-1]:
            outcomes["rewritten"] += 1
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        else:
            (refusal,) = found.refusals[-1]
            outcomes[refusal.reason.split(":")[0]] += 1
            if not options.get("dropout_p"):
                torch.testing.assert_close(out, expected)
    refused = set(outcomes) - {"rewritten"}
    assert refused <= {"decoding", "dropout in effect", "unsupported dtype", "unsupported shape"}, outcomes
