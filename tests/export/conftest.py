"""Models that are exported."""

from __future__ import annotations

import pytest
from torch import nn

from tests.export.helpers import Grouped


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def grouped(request: pytest.FixtureRequest) -> nn.Module:
    return Grouped(request.param).eval()
