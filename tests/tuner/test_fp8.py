"""FP8 is decided head by head, by what the operator measures, and a recipe carries it to the graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import afbs_compile
from afbs_compile.errors import OptionError, RecipeError
from afbs_compile.kernels import op
from afbs_compile.kernels.attend.run import run
from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.spec.fp8 import Fp8Constants
from afbs_compile.recipe import Recipe
from afbs_compile.tuner import fp8 as tuner_fp8
from afbs_compile.tuner import site
from afbs_compile.tuner.clock import Times
from afbs_compile.tuner.measure import Meter, relative_l1
from afbs_compile.tuner.settings import TuneSettings
from afbs_compile.tuner.site import tune_site
from afbs_compile.tuner.space import dense_heads
from afbs_compile.tuner.speed import Stopwatch
from tests.fp8_engine import stand_in
from tests.toy import HEADS, WIDTH, Toy, always_faster, drifting, without_a_clock
from tests.tuner.test_site import operands

pytestmark = pytest.mark.usefixtures("sparse_is_faster")

LENGTH = 1024
TOLERANCE = 0.08
FP8 = TuneSettings(tolerance=TOLERANCE, precision="fp8")


@pytest.fixture
def with_engine(monkeypatch):
    stand_in(monkeypatch)


def sharp(sample: Operands, head: int) -> Operands:
    """One head whose scores are so large that FP8 rounds away which key wins."""
    q = sample.q.clone()
    q[:, head] *= 40
    return replace(sample, q=q)


@pytest.mark.usefixtures("with_engine")
@pytest.mark.slow
def test_heads_within_the_tolerance_are_in_fp8_and_the_others_say_why():
    samples = [sharp(operands(seed), 3) for seed in range(2)]
    result = tune_site(samples, FP8)
    assert result.call.shape == BlockShape(128, 128)
    assert result.precision_reasons is not None
    assert result.call.precision[3] == "own"
    assert result.precision_reasons[3].startswith("error ")
    assert "fp8" in result.call.precision[:3]
    assert (result.measured.worst <= TOLERANCE).all()
    # What is recorded is what the operator gives, each head in its precision.
    again = Meter(samples)(result.call).only(~dense_heads(result.call))
    in_fp8 = torch.tensor([name == "fp8" for name in result.call.precision])
    torch.testing.assert_close(result.measured.error[:, in_fp8], again.error[:, in_fp8])
    torch.testing.assert_close(result.measured.sparsity[in_fp8], again.sparsity[in_fp8])
    own = tune_site(samples, replace(FP8, precision="own", shapes=(tuner_fp8.SHAPE,)))
    assert result.call.tau[3] == own.call.tau[3]
    assert torch.equal(result.measured.error[:, 3], own.measured.error[:, 3])


@pytest.mark.slow
@pytest.mark.usefixtures("with_engine")
def test_a_head_that_rounding_takes_over_the_tolerance_steps_back():
    samples = [operands(seed) for seed in range(2)]
    plain = tune_site(samples, replace(FP8, precision="own", shapes=(tuner_fp8.SHAPE,)))
    constants = Fp8Constants.of([(sample.k, sample.v) for sample in samples])
    found = tune_site(samples, FP8)
    assert constants.packed() == found.call.fp8_constants
    in_fp8 = torch.tensor([name == "fp8" for name in found.call.precision])
    back = in_fp8 & (torch.tensor(found.call.tau) > torch.tensor(plain.call.tau))
    assert back.any()
    assert (found.measured.sparsity[back] < plain.measured.sparsity[back]).all()
    assert all(mine >= own for mine, own in zip(found.call.tau, plain.call.tau, strict=True))
    assert found.deciding.any()


@pytest.mark.slow
@pytest.mark.usefixtures("with_engine")
def test_fp8_must_make_up_for_what_a_step_back_computes(monkeypatch):
    monkeypatch.setattr(tuner_fp8, "timed", lambda calls: Times((1.0, 0.999), busy=False))
    samples = [operands(seed) for seed in range(2)]
    plain = tune_site(samples, replace(FP8, precision="own", shapes=(tuner_fp8.SHAPE,)))
    found = tune_site(samples, FP8)
    for head, name in enumerate(found.call.precision):
        assert name == "own" or found.call.tau[head] == plain.call.tau[head]


@pytest.mark.usefixtures("with_engine")
def test_where_fp8_is_not_faster_every_head_keeps_its_precision(monkeypatch):
    monkeypatch.setattr(tuner_fp8, "timed", lambda calls: Times((1.0, 1.5), busy=False))
    result = tune_site([operands()], FP8)
    assert set(result.call.precision) == {"own"}
    assert result.call.fp8_constants == ()
    assert "not faster: 1.5 ms in FP8, 1 ms" in result.precision_reasons


def test_a_device_without_fp8_says_so():
    result = tune_site([operands()], FP8)
    assert set(result.call.precision) == {"own"}
    assert set(result.precision_reasons) <= {"cpu is no NVIDIA GPU of compute capability 9.x", None}
    assert result.call.shape != tuner_fp8.SHAPE


@pytest.fixture(scope="module")
def calibrated() -> Recipe:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        without_a_clock(patch)
        model, x = Toy().eval(), drifting(LENGTH)
        return afbs_compile.calibrate(model, [x], tolerance=TOLERANCE, precision="fp8", min_length=64)


@pytest.fixture
def recipe(calibrated, with_engine) -> Recipe:
    return calibrated


def test_a_recipe_carries_it_to_the_graph_and_back(recipe, monkeypatch, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded == recipe
    assert {name for s in recipe.sites for name in s.calibrated.precision} >= {"fp8"}
    calls = []
    monkeypatch.setattr(op, "run", lambda operands, call: calls.append(call) or run(operands, call))
    torch._dynamo.reset()
    model = torch.compile(Toy().eval(), backend="afbs", options={"recipe": loaded})
    with torch.no_grad():
        model(drifting(LENGTH))
    assert [call.precision for call in calls] == [s.calibrated.precision for s in recipe.sites]
    assert [call.fp8_constants for call in calls] == [s.calibrated.fp8_constants for s in recipe.sites]
    rows = afbs_compile.explain(model).rows
    assert all(row.fp8_heads > 0 for row in rows)
    assert f"{rows[0].fp8_heads} fp8" in str(afbs_compile.explain(recipe))


@pytest.mark.slow
def test_another_device_keeps_its_own_precision_and_says_so(recipe, monkeypatch):
    monkeypatch.undo()  # no FP8 here after all
    monkeypatch.setattr(site.SiteSpeed, "measure", staticmethod(always_faster))
    torch._dynamo.reset()
    model = torch.compile(Toy().eval(), backend="afbs", options={"recipe": recipe})
    with torch.no_grad():
        model(drifting(LENGTH))
    row = afbs_compile.explain(model).rows[0]
    assert row.outcome == "sparse"
    assert row.fp8_heads == 0
    assert "cpu is no NVIDIA GPU of compute capability 9.x" in row.precision_reason
    assert "not in FP8" in str(afbs_compile.explain(model))


def test_heads_in_fp8_without_the_constants_of_their_keys_are_refused(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    data = json.loads(path.read_text())
    call = data["graphs"][0]["sites"][0]["call"]
    assert "fp8" in call["precision"]
    call["fp8_constants"] = []
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match="has heads in FP8 and not the constants of its key heads"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision: got 'int8'; accepted: 'own' or 'fp8'"),
        ({"precision": "fp8", "method": "paper"}, "precision: got 'fp8'; accepted: 'own' unless method is 'afbs'"),
        ({"precision": "fp8", "tolerance": {"kl": 0.1}}, "precision: got 'fp8'; accepted: 'own' unless"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        afbs_compile.calibrate(Toy(), [torch.zeros(1, 128, WIDTH)], **options)


@pytest.mark.usefixtures("with_engine")
def test_later_sites_are_calibrated_on_what_fp8_makes(monkeypatch):
    seen = []
    tune = site.tune_site
    monkeypatch.setattr(
        "afbs_compile.tuner.graph.tune_site", lambda samples, *a, **k: seen.append(samples[0]) or tune(samples, *a, **k)
    )
    model = Toy().eval()
    recipe = afbs_compile.calibrate(model, [drifting(LENGTH)], tolerance=TOLERANCE, precision="fp8", min_length=64)
    first, row = seen[0], recipe.sites[0]
    assert "fp8" in row.calibrated.precision
    out, _ = run(first, row.calibrated)
    with torch.no_grad():
        x = drifting(LENGTH)
        x = x + 0.1 * model.layers[0].out(out.transpose(1, 2).flatten(2))
        k = model.layers[1].qkv(x).chunk(3, -1)[1].unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
    assert float(relative_l1(seen[1].k, k).max()) < 1e-5


def test_timings_lost_in_noise_decide_nothing(monkeypatch):
    monkeypatch.setattr(Stopwatch, "attention_ms", lambda *_: 0.0)
    result = tune_site([operands()], replace(FP8, precision="own"))
    assert not result.call.is_dense
