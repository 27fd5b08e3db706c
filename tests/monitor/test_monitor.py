"""A compiled model that is watched: what it sees, what it does about it, and what that leaves as it was."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import afbs_compile
from afbs_compile.errors import AfbsWarning, CalibrationError, OptionError
from afbs_compile.monitor.monitor import OUTPUT
from afbs_compile.monitor.rows import RowErrors
from tests.toy import WIDTH, LanguageToy, Toy, drifting, token_ids, without_a_clock

LENGTH = 512
CALIBRATED = [drifting(LENGTH, seed=seed) for seed in range(30)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, fresh_dynamo):
    without_a_clock(monkeypatch)


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        without_a_clock(patch)
        return afbs_compile.calibrate(Toy().eval(), CALIBRATED, tolerance=0.05, min_length=128)


def watched(model, recipe, **how):
    how = {"share": 1.0, "look_every": 1, **how}
    return torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 128, "monitor": how})


def diffuse(seed, length=LENGTH):
    """Inputs unlike those of the calibration: rows are short, and see all others about alike."""
    return 0.2 * torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def only_monitor(model):
    (monitor,) = afbs_compile.monitors(model)
    return monitor


@torch.no_grad()
def until_alarm(model, calls=40):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AfbsWarning)
        for number in range(calls):
            model(diffuse(number))
            if only_monitor(model).alarms:
                return number + 1
    raise AssertionError("no alarm")


@torch.no_grad()
def test_watching_changes_no_result(recipe):
    model, x = Toy().eval(), drifting(LENGTH, seed=40)
    plain = torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 128})(x)
    torch._dynamo.reset()
    state = torch.get_rng_state()
    assert torch.equal(watched(model, recipe)(x), plain)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_inputs_like_the_samples_raise_no_alarm(recipe):
    model = watched(Toy().eval(), recipe)
    for seed in range(100, 160):
        model(drifting(LENGTH, seed=seed))
    monitor = only_monitor(model)
    assert monitor.alarms == ()
    rows = monitor.to_records()
    assert len(rows) == 8
    assert {row["sampled"] for row in rows} == {0, 60}  # heads that keep everything are not looked at
    assert all(row["promised_rate"] == recipe.graphs[0].promise.head_bound for row in rows)
    assert all(row["limit"] == 0.05 and not row["dense"] for row in rows)


@torch.no_grad()
def test_other_inputs_raise_one_and_its_heads_are_dense_at_once(recipe):
    said = []
    model = watched(Toy().eval(), recipe, on_alarm=said.append)
    x = diffuse(99)
    before = (model(x) - Toy().eval()(x)).abs().mean()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert until_alarm(model) <= 10
        for seed in range(50, 60):  # the others follow
            model(diffuse(seed))
        after = (model(x) - Toy().eval()(x)).abs().mean()
    monitor = only_monitor(model)
    assert tuple(said) == monitor.alarms
    assert monitor.alarms[0].evidence >= 20
    assert "dense from now on" in said[-1].reason
    dense = {(row["site"], row["head"]) for row in monitor.to_records() if row["dense"]}
    assert dense == {head for alarm in monitor.alarms for head in alarm.heads}
    assert dense
    assert after < 0.2 * before


@torch.no_grad()
def test_no_look_costs_nothing_and_says_nothing(recipe):
    model = watched(Toy().eval(), recipe, share=1e-9)
    for seed in range(5):
        model(diffuse(seed))
    monitor = only_monitor(model)
    assert {row["sampled"] for row in monitor.to_records()} == {0}
    assert {row["calls"] for row in monitor.to_records()} == {5}
    assert "0 looks at a head in 5 calls, 0 alarms" in monitor.note


@torch.no_grad()
def test_the_share_is_the_chance_of_a_look(recipe):
    model = watched(Toy().eval(), recipe, share=0.3)
    for seed in range(200):
        model(CALIBRATED[seed % 30])
    looks = [row["sampled"] for row in only_monitor(model).to_records() if row["sampled"]]
    assert all(25 <= count <= 100 for count in looks)


@torch.no_grad()
@pytest.mark.parametrize(("look_ms", "share"), [(5.0, 0.002), (1.0, 0.01), (0.0, 0.01), (1000.0, 1e-5)])
def test_by_default_looks_take_a_hundredth_of_the_calls_time(recipe, monkeypatch, look_ms, share):
    times = itertools.cycle([lambda: 1.0, lambda: look_ms])
    monkeypatch.setattr("afbs_compile.monitor.monitor.machine.clocked", lambda call, _: (call(), next(times)))
    monkeypatch.setattr("afbs_compile.monitor.monitor.Monitor.draws", lambda *_: True)
    model = watched(Toy().eval(), recipe, share=None)
    for seed in range(4):
        model(CALIBRATED[seed])
    looked_at = [each for each in only_monitor(model)._watched.values() if each.sampled]
    assert [each.share for each in looked_at] == [pytest.approx(share)] * len(looked_at)
    assert looked_at
    assert sum(len(each.took) for each in looked_at) <= 1, "what was read is forgotten"


@torch.no_grad()
def test_a_share_that_is_given_is_kept(recipe):
    model = watched(Toy().eval(), recipe, share=1.0)
    for seed in range(4):
        model(CALIBRATED[seed])
    looked_at = [each for each in only_monitor(model)._watched.values() if each.sampled]
    assert {(each.share, each.sampled, len(each.took)) for each in looked_at} == {(1.0, 4, 0)}


@torch.no_grad()
def test_a_callback_that_fails_does_not_stop_the_model(recipe):
    def broken(alarm):
        raise RuntimeError("the pager is off")

    model = watched(Toy().eval(), recipe, on_alarm=broken)
    with pytest.warns(AfbsWarning, match="on_alarm failed: the pager is off"):
        [model(diffuse(seed)) for seed in range(20)]
    assert only_monitor(model).alarms


@torch.no_grad()
def test_what_is_known_is_told(recipe):
    model = watched(Toy().eval(), recipe)
    until_alarm(model)
    monitor = only_monitor(model)
    explained = str(afbs_compile.explain(model))
    assert "monitor:" in explained
    assert "made dense" in explained
    text = monitor.to_prometheus()
    assert f"afbs_alarms_total {len(monitor.alarms)}\n" in text
    (site, head), *_ = monitor.alarms[0].heads
    assert f'afbs_head_dense{{site="{site}",head="{head}"}} 1\n' in text
    told = monitor.to_dict()
    assert told["alarms"][0]["heads"][0] == (site, head)
    assert len(told["heads"]) == 8
    assert afbs_compile.explain(model).watched == (told,)


@torch.no_grad()
def test_calibrated_again_on_demand_on_what_was_kept(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    recipe.save(path)
    original = path.read_bytes()
    model = watched(Toy().eval(), path, keep=3)
    until_alarm(model)
    monitor = only_monitor(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        new = monitor.recalibrate()
        x = diffuse(77)
        found = model(x)
    assert new.graphs[0].samples.count <= 3
    assert new.history[0].reason == monitor.alarms[-1].reason
    assert new.history[0].heads
    torch.testing.assert_close(found, Toy().eval()(x), rtol=0.2, atol=0.02)
    assert not any(row["dense"] for row in monitor.to_records())
    assert (tmp_path / "recipe.1.json").stat().st_mode & 0o077 == 0
    saved = afbs_compile.Recipe.load(tmp_path / "recipe.1.json")
    assert saved == new == monitor.recipe == afbs_compile.explain(model).recipe
    assert path.read_bytes() == original
    assert "calibrated again" in str(afbs_compile.explain(saved))
    monitor.recalibrate()
    assert len(afbs_compile.Recipe.load(tmp_path / "recipe.2.json").history) == 2


@torch.no_grad()
def test_calibrated_again_by_itself_beside_the_calls(recipe):
    model = watched(Toy().eval(), recipe, keep=2, recalibrate="automatically")
    until_alarm(model)
    monitor = only_monitor(model)
    for _ in range(600):
        model(diffuse(5))
        if monitor.recipe.history:
            break
    assert monitor.recipe.history[0].heads
    assert monitor.recipe is not recipe


@torch.no_grad()
def test_nothing_is_kept_unless_it_is_asked_for(recipe):
    model = watched(Toy().eval(), recipe)
    model(drifting(LENGTH))
    with pytest.raises(CalibrationError, match="no inputs were kept to calibrate on again: keep is 0"):
        only_monitor(model).recalibrate()


def test_automatically_needs_inputs(recipe):
    model = watched(Toy().eval(), recipe, recalibrate="automatically")
    with torch.no_grad(), pytest.raises(Exception, match="monitor: keep is 0; accepted: at least 1 with recalibrate"):
        model(drifting(LENGTH))


@torch.no_grad()
def test_weights_written_into_are_noticed_under_a_monitor(recipe):
    model = Toy().eval()
    sparse = watched(model, recipe)
    sparse(drifting(LENGTH))
    for layer in model.layers:
        layer.sharpness.mul_(0.02)
    x = drifting(LENGTH, seed=3)
    with pytest.warns(AfbsWarning, match="hold; the others are dense"):
        found = sparse(x)
    assert (found - model(x)).norm() < 0.02 * model(x).norm()


@torch.no_grad()
def test_a_budget_is_watched_by_the_output():
    toy = LanguageToy(LENGTH).eval()
    recipe = afbs_compile.calibrate(
        toy, [token_ids(LENGTH, s) for s in range(4)], tolerance={"kl": 0.2}, min_length=128
    )
    assert recipe.sparsity > 0
    model = watched(toy, recipe, look_every=1)
    for seed in range(60):
        model(token_ids(LENGTH, seed))
    rows = {row["site"]: row for row in only_monitor(model).to_records()}
    assert 5 <= rows[OUTPUT]["sampled"] <= 30  # a quarter of the looks
    assert {row["sampled"] for name, row in rows.items() if name != OUTPUT} == {0}
    assert not only_monitor(model).alarms


@torch.no_grad()
def test_a_budget_that_is_overspent_makes_every_call_dense(monkeypatch):
    monkeypatch.setattr("afbs_compile.monitor.graph.OUTPUT_SHARE", 1.0)
    toy = LanguageToy(LENGTH).eval()
    recipe = afbs_compile.calibrate(
        toy, [token_ids(LENGTH, s) for s in range(4)], tolerance={"kl": 0.2}, min_length=128
    )
    monkeypatch.setattr("afbs_compile.monitor.graph.cost_of_output", lambda *_: 1.0)
    model = watched(toy, recipe)
    x = token_ids(LENGTH, 9)
    assert not torch.allclose(model(x), toy(x), rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(30):
            model(token_ids(LENGTH, seed))
    monitor = only_monitor(model)
    assert monitor.alarms[0].heads == ((OUTPUT, 0),)
    assert any("the output changes by more than the budget" in str(warning.message) for warning in said)
    torch.testing.assert_close(model(x), toy(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_an_output_that_cannot_be_compared_leaves_the_heads_watched(monkeypatch):
    def refuses(*_):
        raise OptionError("tolerance: a budget on the output needs logits")

    monkeypatch.setattr("afbs_compile.monitor.graph.OUTPUT_SHARE", 1.0)
    monkeypatch.setattr("afbs_compile.monitor.graph.cost_of_output", refuses)
    toy = LanguageToy(LENGTH).eval()
    recipe = afbs_compile.calibrate(toy, [token_ids(LENGTH)], tolerance={"kl": 0.2}, min_length=128)
    model = watched(toy, recipe)
    with pytest.warns(AfbsWarning, match="the output is not watched, but each head: tolerance: a budget"):
        model(token_ids(LENGTH))
    model(token_ids(LENGTH, 1))
    rows = only_monitor(model).to_records()
    assert OUTPUT not in {row["site"] for row in rows}
    assert max(row["sampled"] for row in rows) == 1
    sites = {site.name: site for site in recipe.sites}
    assert all(row["limit"] == 1.5 * sites[row["site"]].heads[row["head"]].error for row in rows)


@torch.no_grad()
def test_the_paper_s_recipes_are_watched_by_the_paper_s_rule(monkeypatch):
    far_off = True

    def looked(operands, *_):
        return RowErrors(torch.full((operands.heads,), float(far_off)), torch.zeros(operands.heads))

    monkeypatch.setattr("afbs_compile.monitor.betting.STREAK", 12)
    monkeypatch.setattr("afbs_compile.monitor.monitor.row_errors", looked)
    recipe = afbs_compile.calibrate(Toy().eval(), CALIBRATED[:5], method="paper", tolerance=0.05, min_length=128)
    model = watched(Toy().eval(), recipe, keep=2)
    for seed in range(11):
        model(drifting(LENGTH, seed=seed))
    monitor = only_monitor(model)
    assert monitor.alarms == ()
    with pytest.warns(AfbsWarning, match="beyond the tolerance in 100 looks in a row"):
        model(drifting(LENGTH))
    assert monitor.alarms[0].evidence == 12
    new = monitor.recalibrate()
    assert new.method == "paper"
    explored = [len(path.tau) for site in new.sites for path in site.heads[0].search if path.stage == "explore"]
    assert explored == [8, 8]  # "a reduced search budget (8 BO iterations, ...)"
    model(drifting(LENGTH))
    far_off = False
    model(drifting(LENGTH))
    assert max(row["evidence"] for row in monitor.to_records()) == 0


@torch.no_grad()
def test_one_graph_for_all_lengths_has_one_monitor(recipe):
    model = torch.compile(
        Toy().eval(),
        backend="afbs",
        dynamic=True,
        options={"recipe": recipe, "min_length": 128, "monitor": {"share": 1.0}},
    )
    for length in (512, 768, 640):
        x = drifting(length)
        torch.testing.assert_close(model(x), Toy().eval()(x), rtol=0.1, atol=0.05)
    assert max(row["sampled"] for row in only_monitor(model).to_records()) == 3
    model(drifting(100))  # shorter than min_length: another graph, which has nothing to watch
    assert len(afbs_compile.monitors(model)) == 1


@torch.no_grad()
def test_blocks_that_share_a_compilation_are_watched_by_the_model_s_monitor(recipe):
    model = Toy().eval()
    for layer in model.layers:
        layer.compile(backend="afbs", options={"recipe": recipe, "min_length": 128, "monitor": {"share": 1.0}})
    for seed in range(3):
        model(drifting(LENGTH, seed=seed))
    rows = only_monitor(model).to_records()
    assert {row["site"] for row in rows} == {"layers.0", "layers.1"}
    assert max(row["sampled"] for row in rows) == 3
