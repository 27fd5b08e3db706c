"""From a model and a recipe to a rewritten program: whose recipe it is, which call is which, what stays free."""

import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afbs_compile.errors import ExportError, OptionError, RecipeError
from afbs_compile.export.program import rewritten_program
from tests.export.helpers import Grouped, all_left_alone, recipe_for, wandering
from tests.fp8_engine import stand_in
from tests.toy import Toy, drifting

SPARSE = torch.ops.afbs.sparse_attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def calls(program, target):
    return program.exported.graph.find_nodes(op="call_function", target=target)


class Three(nn.Module):
    """Three calls in a row, the second with a dropout that no recipe can have calibrated."""

    def __init__(self, broken=False):
        super().__init__()
        torch.manual_seed(0)
        self.broken = broken

    def forward(self, x):
        q = x.unflatten(-1, (4, 16)).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        if self.broken:
            torch._dynamo.graph_break()
        b = F.scaled_dot_product_attention(a, q, q, dropout_p=0.1)
        return F.scaled_dot_product_attention(b, q, q)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_call_of_the_recipe_is_rewritten(dynamic):
    model, x = Toy().eval(), drifting(130)
    program = rewritten_program(model, recipe_for(model, x), x, dynamic=dynamic)
    assert len(calls(program, SPARSE)) == 2
    assert calls(program, SDPA) == []
    assert [(row.name, row.outcome) for row in program.rows] == [("layers.0", "sparse"), ("layers.1", "sparse")]
    assert program.inputs == {"x": ("batch", "length", 128) if dynamic else (1, 130, 128)}


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "graph break"])
def test_decisions_go_to_the_right_call_past_a_refused_one(broken):
    model, x = Three(broken).eval(), wandering(130)
    program = rewritten_program(model, recipe_for(model, x), x, dynamic=False)
    assert [row.outcome for row in program.rows] == ["sparse", "refused", "sparse"]
    assert [node.kwargs["mask"] for node in calls(program, SPARSE)] == ["causal", "full"]
    assert len(calls(program, SDPA)) == 1
    with torch.no_grad():
        torch.export.export(program.exported.module(), (x,))  # what was rewritten runs, with fake tensors


def test_kv_heads_are_given_unrepeated(grouped):
    x = wandering(130)
    program = rewritten_program(grouped, recipe_for(grouped, x), x, dynamic=True)
    (node,) = calls(program, SPARSE)
    assert [arg.meta["val"].shape[1] for arg in node.args[:3]] == [4, 2, 2]
    assert node.kwargs["mask"] == ("causal" if grouped.causal else "full")


def test_a_call_whose_result_the_model_returns():
    class Bare(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    model, q = Bare().eval(), torch.randn(1, 4, 130, 16)
    program = rewritten_program(model, recipe_for(model, q, tau=1.0), q, dynamic=False)
    assert len(calls(program, SPARSE)) == 1
    buffer = io.BytesIO()
    torch.export.save(program.exported, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(q), model(q))
    assert program.exported.graph_signature.user_outputs == tuple(
        node.name for node in program.exported.graph.output_node().all_input_nodes
    )


def test_calls_left_alone_are_left_alone():
    model, x = Toy().eval(), drifting(130)
    program = rewritten_program(model, all_left_alone(recipe_for(model, x)), x, dynamic=False)
    assert len(calls(program, SDPA)) == 2
    assert {(row.outcome, row.reason) for row in program.rows} == {("dense", "not faster")}


def test_too_short_for_the_recipe_is_dense_unless_the_length_is_free():
    model, x = Toy().eval(), drifting(130)
    recipe = recipe_for(model, x, min_length=1000)
    static = rewritten_program(model, recipe, x, dynamic=False)
    assert [row.reason for row in static.rows] == ["too short: 130 tokens, sparse was measured to pay from 1000"] * 2
    assert all(
        node.kwargs["min_length"] == 1000 for node in calls(rewritten_program(model, recipe, x, dynamic=True), SPARSE)
    )


def test_what_a_format_has_no_form_for_stays_dense():
    model, x = Toy().eval(), drifting(130)
    program = rewritten_program(model, recipe_for(model, x), x, dynamic=False, refuse=lambda *_: "no form here")
    assert calls(program, SPARSE) == []
    assert [(row.outcome, row.reason) for row in program.rows] == [("dense", "no form here")] * 2


class TestRefusals:
    def test_the_recipe_of_other_weights(self):
        recipe = recipe_for(Toy(seed=1).eval(), drifting(130))
        with pytest.raises(
            RecipeError, match=r"^the recipe belongs to another model: same architecture, other weights"
        ):
            rewritten_program(Toy().eval(), recipe, drifting(130), dynamic=False)

    def test_the_recipe_of_another_architecture(self):
        recipe = recipe_for(Toy().eval(), drifting(130))
        with pytest.raises(RecipeError, match=r"^the recipe belongs to another model: its attention calls"):
            rewritten_program(Grouped().eval(), recipe, wandering(130), dynamic=False)

    def test_the_recipe_of_another_predictor(self):
        model, x = Toy().eval(), drifting(130)
        recipe = dataclasses.replace(recipe_for(model, x), predictor_version=99)
        with pytest.raises(RecipeError, match="predictor version 99"):
            rewritten_program(model, recipe, x, dynamic=False)

    def test_training_mode(self):
        model, x = Toy().eval(), drifting(130)
        recipe = recipe_for(model, x)
        with pytest.raises(OptionError, match=r"model\.eval"):
            rewritten_program(model.train(), recipe, x, dynamic=False)

    @pytest.mark.parametrize(
        ("example", "words"),
        [
            (drifting(130)[..., :5], "the model does not run on it"),
            ({"y": drifting(130)}, "the model does not run on it"),
            ((), "does not run|no tensor"),
            ((1,), "does not run|accepted"),
        ],
        ids=["shape", "name", "nothing", "number"],
    )
    def test_an_example_that_does_not_fit(self, example, words):
        model = Toy().eval()
        recipe = recipe_for(model, drifting(130))
        with pytest.raises(OptionError, match=words):
            rewritten_program(model, recipe, example, dynamic=False)

    def test_dynamic_where_nothing_is_free(self):
        class Fixed(nn.Module):
            def forward(self, q):
                return F.scaled_dot_product_attention(q, q, q) + torch.ones(2, 4, 130, 16)

        model, q = Fixed().eval(), torch.randn(2, 4, 130, 16)
        with pytest.raises(ExportError, match="fixes the size of every input"):
            rewritten_program(model, recipe_for(model, q), q, dynamic=True)

    def test_a_model_that_cannot_be_traced(self):
        class Depends(nn.Module):
            def forward(self, q):
                if q.sum() > 0:
                    q = q + 1
                return F.scaled_dot_product_attention(q, q, q)

        model, q = Depends().eval(), torch.randn(1, 4, 130, 16)
        with pytest.raises(ExportError, match=r"^torch\.export cannot trace the model: "):
            rewritten_program(model, recipe_for(model, q), q, dynamic=False)
        assert "forward" not in vars(model)


class TestTransformers:
    @pytest.fixture
    def llama(self):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_its_masks_are_proven_and_gone(self, llama, dynamic):
        """Exported, transformers builds an N x N mask, which must not be computed for nothing."""
        sample = {"input_ids": torch.randint(1, 64, (1, 130))}
        program = rewritten_program(llama, recipe_for(llama, sample), sample, dynamic=dynamic)
        sparse = calls(program, SPARSE)
        assert [node.kwargs["mask"] for node in sparse] == ["causal", "causal"]
        assert all(arg.meta["val"].shape[1] == 2 for node in sparse for arg in node.args[1:3])
        length = sparse[0].meta["val"].shape[2]
        shapes = [
            node.meta["val"].shape for node in program.exported.graph.nodes if hasattr(node.meta.get("val"), "shape")
        ]
        assert not any(list(map(str, shape)).count(str(length)) > 1 for shape in shapes)

    def test_it_returns_a_dictionary_without_a_cache_and_constants_are_part_of_it(self, llama):
        sample = {"input_ids": torch.randint(1, 64, (1, 130)), "logits_to_keep": 1}
        program = rewritten_program(llama, recipe_for(llama, sample, tau=1.0), sample, dynamic=True)
        with torch.no_grad():
            out = program.exported.module()(input_ids=sample["input_ids"])
            torch.testing.assert_close(out["logits"], llama(**sample).logits)
        assert type(out) is dict
        assert out["logits"].shape == (1, 1, 64)
        assert program.inputs == {"input_ids": ("batch", "length")}
        assert program.note.inputs == ("input_ids",)


def test_a_format_without_fp8_computes_in_its_own_precision_and_says_so(monkeypatch):
    stand_in(monkeypatch)
    model, x = Toy().eval(), drifting(130)
    recipe = recipe_for(model, x, block=(128, 128))
    (graph,) = recipe.graphs
    sites = tuple(
        dataclasses.replace(
            site,
            call=dataclasses.replace(site.call, precision=("fp8",) * 4, fp8_constants=(0.5,) * (4 * 34)),
        )
        for site in graph.sites
    )
    recipe = dataclasses.replace(recipe, graphs=(dataclasses.replace(graph, sites=sites),))
    for no_fp8 in (None, "none here"):
        program = rewritten_program(model, recipe, x, dynamic=False, no_fp8=no_fp8)
        for node, row in zip(calls(program, SPARSE), program.rows, strict=True):
            assert ("precision" in node.kwargs) == ("fp8_constants" in node.kwargs) == (no_fp8 is None)
            assert set(row.call.precision) == {"fp8" if no_fp8 is None else "own"}
            assert {head.precision_reason for head in row.heads} == {no_fp8}
