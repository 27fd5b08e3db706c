"""FP8 is decided head by head, by what the operator measures, and a recipe carries it to the graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import afbs_compile
from afbs_compile.errors import OptionError, RecipeError
from afbs_compile.kernels import fp8, op
from afbs_compile.kernels.reference import DIAGONAL_ONLY
from afbs_compile.passes.capture import Operands
from afbs_compile.recipe import Recipe
from afbs_compile.tuner import fp8 as tuner_fp8
from afbs_compile.tuner import site
from afbs_compile.tuner.measure import Meter, relative_l1, with_kept_blocks
from afbs_compile.tuner.site import TuneSettings, tune_site
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
def test_heads_within_the_tolerance_are_in_fp8_and_the_others_say_why():
    samples = [sharp(operands(seed), 3) for seed in range(2)]
    result = tune_site(samples, FP8)
    assert result.shape == (128, 128)
    assert result.precision is not None
    assert result.precision.names[3] == "own"
    assert result.precision.reasons[3].startswith("error ")
    assert "fp8" in result.precision.names[:3]
    assert (result.measured.worst <= TOLERANCE).all()
    # What is recorded is what the operator gives, each head in its precision.
    meter = Meter(with_kept_blocks(samples), block_q=128, block_k=128, policy=result.policy)
    again = meter(result.thresholds, result.precision).only(~result.thresholds.is_dense)
    in_fp8 = torch.tensor([name == "fp8" for name in result.precision.names])
    torch.testing.assert_close(result.measured.error[:, in_fp8], again.error[:, in_fp8])
    torch.testing.assert_close(result.measured.sparsity[in_fp8], again.sparsity[in_fp8])
    own = tune_site(samples, replace(FP8, precision="own", shapes=(tuner_fp8.SHAPE,)))
    assert result.thresholds.tau[3] == own.thresholds.tau[3]
    assert torch.equal(result.measured.error[:, 3], own.measured.error[:, 3])


@pytest.mark.slow
@pytest.mark.usefixtures("with_engine")
def test_a_head_that_rounding_takes_over_the_tolerance_steps_back():
    samples = [operands(seed) for seed in range(2)]
    plain = tune_site(samples, replace(FP8, precision="own", shapes=(tuner_fp8.SHAPE,)))
    constants = fp8.Constants.of([(sample.k, sample.v) for sample in samples])
    assert constants.packed() == tune_site(samples, FP8).precision.constants
    found = tune_site(samples, FP8)
    in_fp8 = torch.tensor([name == "fp8" for name in found.precision.names])
    back = in_fp8 & (found.thresholds.tau > plain.thresholds.tau)
    assert back.any()
    assert (found.measured.sparsity[back] < plain.measured.sparsity[back]).all()
    assert (found.thresholds.tau >= plain.thresholds.tau).all()
    assert found.deciding.any()


@pytest.mark.slow
@pytest.mark.usefixtures("with_engine")
def test_fp8_must_make_up_for_what_a_step_back_computes(monkeypatch):
    monkeypatch.setattr(tuner_fp8, "best_ms", lambda calls: [1.0, 0.999])
    samples = [operands(seed) for seed in range(2)]
    plain = tune_site(samples, replace(FP8, precision="own", shapes=(tuner_fp8.SHAPE,)))
    found = tune_site(samples, FP8)
    for head, name in enumerate(found.precision.names):
        assert name == "own" or found.thresholds.tau[head] == plain.thresholds.tau[head]


@pytest.mark.usefixtures("with_engine")
def test_where_fp8_is_not_faster_every_head_keeps_its_precision(monkeypatch):
    monkeypatch.setattr(tuner_fp8, "best_ms", lambda calls: [1.0, 1.5])
    result = tune_site([operands()], FP8)
    assert set(result.precision.names) == {"own"}
    assert result.precision.constants == ()
    assert "not faster: 1.5 ms in FP8, 1 ms" in result.precision.reasons


def test_a_device_without_fp8_says_so():
    result = tune_site([operands()], FP8)
    assert set(result.precision.names) == {"own"}
    assert set(result.precision.reasons) <= {"cpu is no NVIDIA GPU of compute capability 9.x", None}
    assert result.shape != tuner_fp8.SHAPE


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
    assert {head.precision for s in recipe.sites for head in s.heads} >= {"fp8"}
    calls = []
    fake = op._sparse_attention
    monkeypatch.setattr(op, "_sparse_attention", lambda *a, **k: calls.append(a[7:9]) or fake(*a, **k))
    torch._dynamo.reset()
    model = torch.compile(Toy().eval(), backend="afbs", options={"recipe": loaded})
    with torch.no_grad():
        model(drifting(LENGTH))
    assert [list(names) for names, _ in calls] == [[head.precision for head in s.heads] for s in recipe.sites]
    assert [tuple(constants) for _, constants in calls] == [s.fp8_constants for s in recipe.sites]
    rows = afbs_compile.explain(model).rows
    assert all(row.fp8_heads > 0 for row in rows)
    assert f"{rows[0].fp8_heads} fp8" in str(afbs_compile.explain(recipe))


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


def test_recipes_from_before_fp8_and_kept_blocks_still_load(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    data = json.loads(path.read_text())
    for graph in data["graphs"]:
        for entry in graph["sites"]:
            del entry["fp8_constants"], entry["last_rows"], entry["local_keys"]
            for head in entry["heads"]:
                del head["precision"], head["precision_reason"]
    path.write_text(json.dumps(data))
    loaded = Recipe.load(path)
    assert {head.precision for s in loaded.sites for head in s.heads} == {"own"}
    assert {s.kept for s in loaded.sites} == {DIAGONAL_ONLY}
    data["graphs"][0]["sites"][0]["heads"][0]["precision"] = "fp8"
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
    assert any(head.precision == "fp8" for head in row.heads)
    names = [head.precision for head in row.heads]
    out, _ = op.sparse_attention_with_counts(
        first.q, first.k, first.v, [h.tau for h in row.heads], [h.theta for h in row.heads], [-1000.0] * HEADS,
        causal=True, scale=first.scale, block_q=128, block_k=128, policy=[h.policy for h in row.heads],
        precision=names, fp8_constants=row.fp8_constants, **row.kept._asdict(),
    )  # fmt: skip
    with torch.no_grad():
        x = drifting(LENGTH)
        x = x + 0.1 * model.layers[0].out(out.transpose(1, 2).flatten(2))
        k = model.layers[1].qkv(x).chunk(3, -1)[1].unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
    assert float(relative_l1(seen[1].k, k).max()) < 1e-5


def test_timings_lost_in_noise_decide_nothing(monkeypatch):
    monkeypatch.setattr(Stopwatch, "attention_ms", lambda *_: 0.0)
    result = tune_site([operands()], replace(FP8, precision="own"))
    assert not result.thresholds.is_dense.all()
