"""What a compilation leaves behind after ``torch._dynamo.reset()``: nothing that grows with their number."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensor

import afbs_compile
from afbs_compile import Recipe, samples
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from tests.test_recipe import OLD, Old
from tests.toy import drifting

ROUNDS = 5


def fake_tensors() -> int:
    """How many are alive. Nothing may be bound to one: it would keep the rest of its compilation."""
    gc.collect()
    return sum(type(thing) is FakeTensor for thing in gc.get_objects())


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_no_fake_tensor_outlives_a_reset(fresh_dynamo, dynamic):
    model, x, alive = Old().eval(), drifting(1024), []
    recipe = replace(Recipe.load(OLD), predictor_version=PREDICTOR_VERSION)
    for _ in range(1 + ROUNDS):  # the first round leaves what PyTorch keeps once and for all
        sparse = torch.compile(model, backend="afbs", dynamic=dynamic, options={"min_length": 128, "recipe": recipe})
        sparse(x)
        explanation = afbs_compile.explain(sparse)
        assert [row.outcome for row in explanation.rows] == ["sparse", "sparse", "refused"]
        del sparse, explanation
        torch._dynamo.reset()
        alive.append(fake_tensors())
    assert alive[1:] == [alive[1]] * ROUNDS


def test_what_a_generator_gave_is_kept_as_long_as_the_generator(fresh_dynamo):
    generator = (torch.full((1,), float(i)) for i in range(3))
    given = samples.materialised(generator)
    torch._dynamo.reset()
    samples.forget_samples()
    assert samples.materialised(generator) is given, "it is spent: nothing else has its samples"
    kept = weakref.ref(given[0])
    del given, generator
    gc.collect()
    assert kept() is None


def test_what_another_iterator_gave_is_kept_until_a_reset():
    iterator = map(torch.zeros, [1, 2])
    given = samples.materialised(iterator)
    assert samples.materialised(iterator) is given
    kept = weakref.ref(given[0])
    del given
    samples.forget_samples()
    assert kept() is None
