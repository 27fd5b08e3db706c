"""Digests: every byte and its place count, lengths and addresses do not."""

from __future__ import annotations

import pytest
import torch

from afbs_compile import fingerprint


def digest(*tensors):
    return fingerprint.tensor_digest(tensors)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_equal_values_have_equal_digests_wherever_they_lie(dtype):
    x = (torch.arange(1000) % 7).to(dtype)
    strided = torch.stack([x, x], 1)[:, 0]
    shifted = torch.cat([x[:3], x])[3:]
    assert digest(x) == digest(strided) == digest(shifted) == digest(x.clone())


def test_every_change_changes_the_digest():
    x = torch.randn(64, 1024)
    others = [-x, x.flip(0), x.T.contiguous(), x.bfloat16(), x.view(128, 512), x.clone(), torch.ones(64, 1024)]
    others[5][63, 1023] += 1e-6
    others.append(torch.full((64, 1024), 2.0))
    ids = torch.arange(8192)
    swapped = ids.clone()
    swapped[[5, 6]] = swapped[[6, 5]]
    values = [digest(t) for t in (x, *others, ids, swapped, ids[:-1], ids[:0])] + [digest(), digest(x, x)]
    assert len(set(values)) == len(values)


def test_checksums_do_not_depend_on_the_chunk(monkeypatch):
    x = torch.randn(1001)
    whole = digest(x)
    monkeypatch.setattr(fingerprint, "WORDS_AT_ONCE", 64)
    assert digest(x) == whole
