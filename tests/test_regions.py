"""Models compiled block by block, or broken in every block: one compilation, one table, one recipe."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import afbs_compile
from afbs_compile.errors import AfbsWarning, RecipeError
from tests.toy import HEAD_DIM, HEADS, WIDTH, Attention, Toy, drifting, without_a_clock

LENGTH = 512
BLOCKS = 10
"""More than Dynamo compiles a function for."""
OPTIONS = {"min_length": 128}
ROOT = Path(__file__).parent.parent


class Block(nn.Module):
    """Attention and what stands around it; a break between the two where asked for."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.attn, self.out, self.broken = Attention(), nn.Linear(WIDTH, WIDTH), broken

    def forward(self, x):
        x = x + 0.1 * self.attn(x)
        if self.broken:
            torch._dynamo.graph_break()
        return x + 0.01 * self.out(x)


class Model(nn.Module):
    """A model of blocks that are alike."""

    def __init__(self, broken: bool = False, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(broken) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


NAMES = [f"blocks.{i}.attn" for i in range(BLOCKS)]


@pytest.fixture(autouse=True)
def compilations(monkeypatch, fresh_dynamo):
    """The graphs that were lowered, without inductor."""
    found = []
    monkeypatch.setattr("afbs_compile.backend.lower", lambda gm, *_, **__: found.append(gm) or gm)
    without_a_clock(monkeypatch)
    return found


@pytest.fixture
def never_calibrates(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("afbs_compile.integrations.served.tune_site", fail)
    monkeypatch.setattr("afbs_compile.backend.calibrate_graph", fail)


@pytest.fixture(scope="module")
def recipe():
    """Of the model in one graph."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        without_a_clock(patch)
        found = afbs_compile.calibrate(Model().eval(), [drifting(LENGTH)], **OPTIONS)
    assert len(found.graphs) == 1
    assert [site.outcome for site in found.sites] == ["sparse"] * BLOCKS
    return found


def with_dense(recipe, *names):
    """The recipe with some calls DENSE."""
    sites = tuple(
        replace(site, outcome="dense", reason="not faster: here") if site.name in names else site
        for site in recipe.sites
    )
    return replace(recipe, graphs=(replace(recipe.graphs[0], sites=sites),))


def by_blocks(model, **options):
    for block in model.blocks:
        block.compile(backend="afbs", fullgraph=True, options={**OPTIONS, **options})
    return model


def relative_l1(a, b):
    return float((a - b).abs().sum() / b.abs().sum())


def outcomes(model):
    return {row.site: row.outcome for row in afbs_compile.explain(model).rows}


@torch.no_grad()
def test_one_compilation_serves_all_blocks_with_their_own_constants(recipe, compilations, never_calibrates):
    x = drifting(LENGTH)
    expected = Model().eval()(x)
    dense = by_blocks(Model().eval(), recipe=with_dense(recipe, *NAMES))
    with pytest.warns(AfbsWarning, match=r"no attention call of blocks\.0\.attn is sparse: 1 x not faster"):
        torch.testing.assert_close(dense(x), expected)
    assert outcomes(dense) == dict.fromkeys(NAMES, "dense")
    assert len(compilations) == 1
    torch._dynamo.reset()
    sparse = by_blocks(Model().eval(), recipe=recipe)
    assert 1e-6 < relative_l1(sparse(x), expected) < 0.05
    assert outcomes(sparse) == dict.fromkeys(NAMES, "sparse")
    assert len(compilations) == 2
    assert f"{BLOCKS} calls share one compilation" in str(afbs_compile.explain(sparse))


@torch.no_grad()
def test_each_block_acts_by_its_own_row(recipe, never_calibrates):
    mixed = by_blocks(Model().eval(), recipe=with_dense(recipe, NAMES[3]))
    plain = Model().eval()
    x = drifting(LENGTH)
    mixed(x)
    for number, (compiled, block) in enumerate(zip(mixed.blocks, plain.blocks, strict=True)):
        difference = relative_l1(compiled(x) - x, block(x) - x)
        assert (difference < 1e-5) == (number == 3), number
    assert [name for name, outcome in outcomes(mixed).items() if outcome == "dense"] == [NAMES[3]]


@torch.no_grad()
def test_a_break_in_every_block_costs_no_site(recipe, compilations, never_calibrates):
    sparse, x = (
        torch.compile(Model(broken=True).eval(), backend="afbs", options={**OPTIONS, "recipe": recipe}),
        drifting(LENGTH),
    )
    difference = relative_l1(sparse(x), Model().eval()(x))
    assert 1e-6 < difference < 0.05
    assert outcomes(sparse) == dict.fromkeys(NAMES, "sparse")
    assert sum("shared_attention" in str(gm.code) for gm in compilations) == 1


@torch.no_grad()
def test_a_first_call_calibrates_each_block_and_makes_one_recipe(compilations, never_calibrates, monkeypatch):
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        without_a_clock(patch)
        patch.setattr("afbs_compile.backend.lower", lambda gm, *_, **__: gm)
        model, x = by_blocks(Model(blocks=3).eval()), drifting(LENGTH)
        first = model(x)
        explanation = afbs_compile.explain(model)
    assert [row.site for row in explanation.rows] == NAMES[:3]
    made = explanation.recipe
    assert len(made.graphs) == 1
    assert len({site.call.tau for site in made.sites}) > 1
    torch._dynamo.reset()
    whole = torch.compile(Model(blocks=3).eval(), backend="afbs", fullgraph=True, options={**OPTIONS, "recipe": made})
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        torch.testing.assert_close(whole(x), first, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calibrate_knows_the_blocks_of_a_broken_model(never_calibrates):
    x = drifting(LENGTH)
    made = afbs_compile.calibrate(Model(broken=True, blocks=3).eval(), [x, drifting(LENGTH, seed=1)], **OPTIONS)
    assert [site.name for site in made.sites] == NAMES[:3]
    assert {graph.samples.count for graph in made.graphs} == {2}
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        for model in (Model(blocks=3), Model(broken=True, blocks=3)):
            torch._dynamo.reset()
            sparse = torch.compile(model.eval(), backend="afbs", options={**OPTIONS, "recipe": made})
            sparse(x)
            assert outcomes(sparse) == dict.fromkeys(NAMES[:3], "sparse")


AGAIN = """
import sys, torch, warnings
warnings.simplefilter("error", UserWarning)
import afbs_compile
from tests.test_regions import LENGTH, NAMES, Model, by_blocks, drifting, outcomes, relative_l1
import afbs_compile.backend, afbs_compile.integrations.served as served
afbs_compile.backend.lower = lambda gm, *_, **__: gm
served.tune_site = None  # it would calibrate
with torch.no_grad():
    x = drifting(LENGTH)
    sparse = by_blocks(Model().eval(), recipe=sys.argv[1])
    assert relative_l1(sparse(x), Model().eval()(x)) > 1e-6
    assert outcomes(sparse) == dict.fromkeys(NAMES, "sparse")
"""


def test_a_second_process_calibrates_nothing(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "recipe.json")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_other_lengths_and_dtypes_of_a_block(recipe, compilations, never_calibrates):
    model, plain = by_blocks(Model().eval(), recipe=recipe), Model().eval()
    for length in (LENGTH, 448, 576):
        x = drifting(length)
        assert 1e-6 < relative_l1(model(x), plain(x)) < 0.05, "compiled again, and as sparse"
    torch.testing.assert_close(model(drifting(64)), plain(drifting(64)))
    x = drifting(LENGTH).bfloat16()
    model.bfloat16(), plain.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AfbsWarning)
        assert relative_l1(model(x).float(), plain(x).float()) < 0.1
    assert len(compilations) <= 5


@torch.no_grad()
def test_weights_written_into_are_noticed(recipe, never_calibrates):
    model, x = by_blocks(Model().eval(), recipe=recipe), drifting(LENGTH)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        model.load_state_dict(Model().state_dict())
        model(x)
    for block in model.blocks[:6]:
        block.attn.sharpness.mul_(0.02)  # attention that is spread over all keys
    with pytest.warns(AfbsWarning, match="the weights changed since the attention calls were calibrated"):
        model(x)
    dense = {row.site: row.dense_heads for row in afbs_compile.explain(model).rows}
    assert all(dense[name] for name in NAMES[:6])
    plain = Model().eval()
    plain.load_state_dict(model.state_dict())
    assert relative_l1(model(x), plain(x)) < 0.05


@torch.no_grad()
def test_a_third_model_of_a_class_shares_a_compilation(compilations):
    x = drifting(LENGTH)
    models = [Toy(seed=seed).eval() for seed in range(4)]
    sparse = [torch.compile(model, backend="afbs", fullgraph=True, options=OPTIONS) for model in models]
    for number, model in enumerate(models):
        assert 0 < relative_l1(sparse[number](x), model(x)) <= 0.055
    assert len(compilations) == 3
    assert all(outcomes(model) == {"layers.0": "sparse", "layers.1": "sparse"} for model in sparse)
    assert len({row.error for model in sparse for row in afbs_compile.explain(model).rows}) == 8


@torch.no_grad()
def test_samples_calibrate_each_block_on_its_own(compilations):
    model, x = Model(blocks=2).eval(), drifting(LENGTH)
    by_blocks(model, samples=[drifting(LENGTH, seed=3)])(x)
    assert len(compilations) == 2
    assert outcomes(model) == dict.fromkeys(NAMES[:2], "sparse")


@torch.no_grad()
def test_a_foreign_recipe_is_refused(recipe):
    foreign = Model().eval()
    for parameter in foreign.parameters():
        parameter.normal_()
    with pytest.raises(RecipeError, match="the recipe given belongs to another model: same architecture"):
        by_blocks(foreign, recipe=recipe)(drifting(LENGTH))


@torch.no_grad()
def test_the_limit_grows_with_the_blocks_and_comes_back():
    before = torch._dynamo.config.recompile_limit
    model = torch.compile(Model(broken=True).eval(), backend="afbs", options={**OPTIONS, "first_call": "dense"})
    with pytest.warns(AfbsWarning, match="there is no recipe, and first_call is 'dense'"):
        model(drifting(LENGTH))
    assert torch._dynamo.config.recompile_limit == before * BLOCKS
    torch._dynamo.reset()
    assert torch._dynamo.config.recompile_limit == before


def of_heads(attention, x, sharper=1.0):
    q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    return q * attention.sharpness * sharper, k, v


class SharesABuffer(nn.Module):
    """A block whose attention stands between two breaks, beside a buffer that all blocks have."""

    def __init__(self, common: nn.Module, sharper: float) -> None:
        super().__init__()
        self.inner, self.common, self.sharper = Attention(), common, sharper

    def forward(self, x):
        q, k, v = of_heads(self.inner, x, self.sharper)
        torch._dynamo.graph_break()
        out = F.scaled_dot_product_attention(q * self.common.one, k, v, is_causal=True)
        torch._dynamo.graph_break()
        return x + 0.1 * self.inner.out(out.transpose(1, 2).flatten(2))


class Twice(nn.Module):
    """A block that makes two calls itself, by the same line of code, a break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def once(self, x, sharper):
        out = F.scaled_dot_product_attention(*of_heads(self.inner, x, sharper), is_causal=True)
        return x + 0.1 * out.transpose(1, 2).flatten(2)

    def forward(self, x):
        x = self.once(x, 4.0)
        torch._dynamo.graph_break()
        return self.once(x, 1.0)


def with_blocks(*blocks):
    model = Model(blocks=0).eval()
    model.blocks.extend(blocks)
    return model


@torch.no_grad()
def test_blocks_that_share_a_buffer_have_constants_of_their_own(compilations):
    torch.manual_seed(0)
    common = nn.Module()
    common.register_buffer("one", torch.ones(1))
    model = with_blocks(*(SharesABuffer(common, sharper) for sharper in (4.0, 1.0, 4.0)))
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    compiled(drifting(LENGTH))
    errors = {row.site: row.error for row in afbs_compile.explain(compiled).rows}
    assert list(errors) == ["blocks.0", "blocks.1", "blocks.2"]
    assert errors["blocks.1"] > 10 * max(errors["blocks.0"], errors["blocks.2"]), "calibrated on its own inputs"
    assert sum("shared_attention" in gm.code for gm in compilations) == 1


@torch.no_grad()
def test_calls_of_one_module_in_several_graphs_have_constants_of_their_own(compilations):
    torch.manual_seed(0)
    model, x = with_blocks(Twice(), Twice()), drifting(LENGTH)
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    first = compiled(x)
    explanation = afbs_compile.explain(compiled)
    errors = {row.site: row.error for row in explanation.rows}
    assert list(errors) == ["blocks.0", "blocks.0#2", "blocks.1", "blocks.1#2"]
    assert all(errors[f"blocks.{i}#2"] > 10 * errors[f"blocks.{i}"] for i in range(2))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        again = torch.compile(model, backend="afbs", options={**OPTIONS, "recipe": explanation.recipe})
        torch.testing.assert_close(again(x), first)
    assert outcomes(again) == dict.fromkeys(errors, "sparse")


@torch.no_grad()
def test_a_model_is_let_go_of():
    model = by_blocks(Model(blocks=2).eval(), first_call="dense")
    with pytest.warns(AfbsWarning, match="there is no recipe, and first_call is 'dense'"):
        model(drifting(LENGTH))
    weight = weakref.ref(model.blocks[0].attn.qkv.weight)
    del model
    gc.collect()
    assert weight() is None


@torch.no_grad()
def test_a_limit_that_was_set_in_between_stays():
    with torch._dynamo.config.patch(recompile_limit=4):
        model = torch.compile(Model(broken=True, blocks=3).eval(), backend="afbs", options={"first_call": "dense"})
        model(drifting(64))
        assert torch._dynamo.config.recompile_limit == 12
        torch._dynamo.config.recompile_limit = 10
        torch._dynamo.reset()
        assert torch._dynamo.config.recompile_limit == 10


class Methodical(nn.Module):
    """A block whose attention is a method of a part, without parameters, which is not called as a module."""

    def __init__(self, sharper: float) -> None:
        super().__init__()
        self.inner, self.part, self.sharper = Attention(), Part(), sharper

    def forward(self, x):
        q, k, v = of_heads(self.inner, x, self.sharper)
        torch._dynamo.graph_break()
        return x + 0.1 * self.inner.out(self.part.attend(q, k, v).transpose(1, 2).flatten(2))


class Part(nn.Module):
    def attend(self, q, k, v):
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.no_grad()
def test_a_graph_without_tensors_of_a_method(compilations):
    torch.manual_seed(0)
    model, x = with_blocks(*(Methodical(sharper) for sharper in (4.0, 1.0, 4.0))), drifting(LENGTH)
    compiled = torch.compile(model, backend="afbs", options=OPTIONS)
    first = compiled(x)
    explanation = afbs_compile.explain(compiled)
    assert [row.site for row in explanation.rows] == ["blocks.0.part", "blocks.1.part", "blocks.2.part"]
    errors = [row.error for row in explanation.rows]
    assert errors[1] > 10 * max(errors[0], errors[2]), "calibrated on its own inputs"
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AfbsWarning)
        again = torch.compile(model, backend="afbs", options={**OPTIONS, "recipe": explanation.recipe})
        torch.testing.assert_close(again(x), first)


@torch.no_grad()
def test_blocks_that_no_module_calls_share_a_compilation(recipe, compilations, never_calibrates):
    model, x = by_blocks(Model().eval(), recipe=recipe), drifting(LENGTH)
    whole = torch.compile(Model().eval(), backend="afbs", fullgraph=True, options={**OPTIONS, "recipe": recipe})
    expected = whole(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AfbsWarning)  # calls have other names here, and are checked once
        for block in model.blocks:
            x = block(x)
    assert len(compilations) == 1 + 3
    torch.testing.assert_close(x, expected)
