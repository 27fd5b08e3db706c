"""The whole ONNX file: against the torch operator, the original model, and what ONNX's own checker accepts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from afbs_compile.errors import ExportError, OptionError
from afbs_compile.export import load, to_onnx
from afbs_compile.export.files import NOTE
from afbs_compile.export.onnx import NO_BOUND, OPSETS
from afbs_compile.export.onnx_function import VERSION
from afbs_compile.export.onnx_predict import policy_codes
from afbs_compile.kernels.masks.base import Band
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.policies.base import OnnxBody, Policy
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.kernels.spec.selection import PREDICTOR_VERSION
from tests.export.helpers import Grouped, all_left_alone, recipe_for, reference_by_hand, relative_difference, wandering

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")
pytest.importorskip("onnxruntime", reason="the extra export is not installed")

EXAMPLES = str(Path(__file__).parent.parent.parent / "examples")
TOLERANCE = 1e-4
"""Largest difference over the largest number."""


def exported(model, x, path, **options):
    """Export the model with thresholds that skip about half of its blocks from 64 tokens on."""
    recipe = recipe_for(model, x, tau=0.6, theta=0.3, min_length=64)
    to_onnx(model, recipe, x, path, dynamic=True, **options)
    return recipe


@pytest.fixture(scope="module")
def causal_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    model = Grouped().eval()
    return model, exported(model, wandering(130), path), path


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(tmp_path, opset):
    model, x = Grouped(causal=opset % 2 == 0).eval(), wandering(300, batch=2, seed=1)
    recipe = exported(model, wandering(130), tmp_path / "model.onnx", opset=opset)
    (out,) = load(tmp_path / "model.onnx")(x)
    with reference_by_hand(recipe):
        assert relative_difference(out, model(x)) < TOLERANCE
    model = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset, "afbs": VERSION}


@pytest.mark.parametrize(
    ("batch", "length"), [(1, 512), (2, 512), (1, 1024), (2, 777), (1, 65), (2, 64), (3, 40), (1, 2)]
)
def test_one_file_for_every_batch_and_length(causal_file, batch, length):
    model, recipe, path = causal_file
    x = wandering(length, batch, seed=2)
    (out,) = load(path)(x)
    with reference_by_hand(recipe):
        assert relative_difference(out, model(x)) < TOLERANCE
    with torch.no_grad():
        dense = model(x)
    if length < 64:
        assert relative_difference(out, dense) < TOLERANCE
    if length > 128:
        assert relative_difference(out, dense) > 0.01, "nothing was skipped, so nothing was tested"


@pytest.mark.parametrize("names", [list(policy_codes())[:4], list(policy_codes())[-4:]], ids=["first", "last"])
def test_heads_of_several_policies(tmp_path, names):
    model, names = Grouped().eval(), (names * 2)[:4]
    recipe = recipe_for(model, wandering(130), tau=[0.7, 0.8, 0.85, 0.75], policy=names)
    written = to_onnx(model, recipe, wandering(130), tmp_path / "model.onnx", dynamic=True)
    assert [row.outcome for row in written.rows] == ["sparse"]
    for length in (65, 300, 577):
        x = wandering(length, batch=2, seed=1)
        (out,) = load(tmp_path / "model.onnx")(x)
        with reference_by_hand(recipe):
            assert relative_difference(out, model(x)) < TOLERANCE
    with torch.no_grad():
        assert relative_difference(out, model(x)) > 0.01, "nothing was skipped, so nothing was tested"


class ByFirst(Policy):
    """A policy from outside the package: the first query of a block against the first key of a block."""

    name = "by_first"
    rule = "share"

    def __init__(self, onnx):
        self.onnx = onnx

    def scores(self, operands, shape):
        keys = operands.k[:, :, :: shape.k].repeat_interleave(operands.groups, 1)
        return operands.q[:, :, :: shape.q] @ keys.transpose(-1, -2) * operands.scale


SCORE_BY_FIRST = """
ScoreByFirst (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    => (scores)
{
    first = Constant <value = int64 {0}> ()
    q_blocks, q_sizes = afbs.InBlocks (q, size_q)
    k_blocks, k_sizes = afbs.InBlocks (k, size_k)
    rows = Gather <axis = 3> (q_blocks, first)
    cols = Gather <axis = 3> (k_blocks, first)
    columns = Transpose <perm = [0, 1, 3, 2]> (cols)
    products = MatMul (rows, columns)
    scores = Mul (products, scaling)
}
"""


def test_a_policy_from_outside_brings_its_body(tmp_path, monkeypatch, grouped):
    monkeypatch.setitem(POLICIES, "by_first", ByFirst(OnnxBody("ScoreByFirst", (SCORE_BY_FIRST,))))
    recipe = recipe_for(grouped, wandering(130), tau=[0.5, 0.6, 0.7, 0.8], policy=["by_first", "meanshare"] * 2)
    written = to_onnx(grouped, recipe, wandering(130), tmp_path / "model.onnx", dynamic=True)
    assert [row.outcome for row in written.rows] == ["sparse"]
    for length in (65, 300, 577):
        x = wandering(length, batch=2, seed=1)
        (out,) = load(tmp_path / "model.onnx")(x)
        with reference_by_hand(recipe):
            assert relative_difference(out, grouped(x)) < TOLERANCE
    with torch.no_grad():
        assert relative_difference(out, grouped(x)) > 0.01, "nothing was skipped, so nothing was tested"
    (node,) = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.domain == "afbs"]
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert given["order"] == [1, 3, 0, 2]
    assert given["ends"] == [0, 0, 2, 2, 2, 2, 2, 2, 4]
    assert given["ahead"] == (0 if grouped.causal else NO_BOUND)


def test_all_dense_is_the_original_model(tmp_path, grouped):
    x = wandering(130)
    recipe = recipe_for(grouped, x)
    to_onnx(grouped, all_left_alone(recipe), x, tmp_path / "left.onnx", dynamic=True)
    to_onnx(grouped, recipe_for(grouped, x, tau=1.0), x, tmp_path / "all.onnx", dynamic=True)
    x = wandering(300, batch=2, seed=1)
    for name in ("left.onnx", "all.onnx"):
        (out,) = load(tmp_path / name)(x=x)
        with torch.no_grad():
            assert relative_difference(out, grouped(x)) < 1e-5


def test_one_node_for_each_call_that_says_how_to_claim_it(causal_file):
    _, recipe, path = causal_file
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.domain == "afbs"]
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert node.op_type == "SparseAttention"
    assert given["policy"] == [b"meansim"] * 4
    assert (given["order"], given["ends"]) == ([0, 1, 2, 3], [0, *[4] * len(policy_codes())])
    assert given["predictor_version"] == PREDICTOR_VERSION
    assert given["tau"] == pytest.approx([0.6] * 4)
    assert given["theta"] == pytest.approx([0.3] * 4)
    assert (given["mask"], given["ahead"], given["behind"]) == (b"causal", 0, NO_BOUND)
    assert (given["chunk"], given["at_end"]) == (NO_BOUND, 0)
    assert (given["block_q"], given["block_k"], given["min_length"], given["max_length"]) == (64, 64, 64, 0)
    assert given["scale"] == pytest.approx(0.25)
    assert not [n for n in model.graph.node if n.op_type == "Softmax"], "no attention outside of the node"
    assert "SparseAttention" in [function.name for function in model.functions]
    note = json.loads({entry.key: entry.value for entry in model.metadata_props}[NOTE])
    assert note["recipe"]["options"]["tolerance"] == recipe.tolerance


def test_the_checker_and_the_shapes(causal_file):
    _, _, path = causal_file
    onnx.checker.check_model(str(path), full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    for value in (*inferred.graph.input, *inferred.graph.output):
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert sizes == ["batch", "length", 64]


def test_a_file_of_fixed_size(tmp_path):
    model, x = Grouped().eval(), wandering(130)
    recipe = recipe_for(model, x, tau=0.6)
    written = to_onnx(model, recipe, x, tmp_path / "model.onnx")
    assert written.inputs == {"x": (1, 130, 64)}
    (out,) = load(tmp_path / "model.onnx")(x)
    with reference_by_hand(recipe):
        assert relative_difference(out, model(x)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_the_example_runs_a_shipped_language_model_without_us(tmp_path, monkeypatch):
    """All of examples/export_onnx.py but its calibration, with the first two layers of its model."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("export_onnx")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        example.MODEL, dtype=torch.float32, num_hidden_layers=2
    ).eval()
    ids = torch.randint(3, 8192, (2, 512), generator=torch.Generator().manual_seed(0))
    recipe = recipe_for(model, {"input_ids": ids[:1]}, tau=0.9, min_length=256)
    sizes = [(2, 512)]
    written, rows = example.export_and_compare(model, recipe, ids, sizes, tmp_path)
    assert [row.outcome for row in written.rows] == ["sparse"] * 2
    assert [row[:2] for row in rows] == sizes
    assert all(row[2] < TOLERANCE for row in rows)
    assert [row[3] for row in rows] == [1.0], "the same most probable token at every position"


class TestRefusals:
    @pytest.mark.parametrize("opset", [17, 24, "20"])
    def test_an_opset_that_is_not_accepted(self, tmp_path, opset):
        with pytest.raises(OptionError, match="opset: got .*; accepted: 18 to 23"):
            to_onnx(Grouped().eval(), None, wandering(130), tmp_path / "model.onnx", opset=opset)

    def test_a_policy_without_a_form_stays_dense(self, causal_file, tmp_path, monkeypatch):
        having = list(POLICIES)
        assert len(having) == 7
        monkeypatch.setitem(POLICIES, "of_tomorrow", ByFirst(None))
        model, x = causal_file[0], wandering(130)
        recipe = recipe_for(model, x, policy=["meansim", "of_tomorrow"] * 2)
        (row,) = to_onnx(model, recipe, x, tmp_path / "model.onnx").rows
        sentence = f"no form in ONNX: policy of_tomorrow; {', '.join(having)} have one"
        assert (row.outcome, row.reason) == ("dense", sentence)
        (out,) = load(tmp_path / "model.onnx")(x)
        with torch.no_grad():
            assert relative_difference(out, model(x)) < 1e-5

    @pytest.mark.parametrize("band", [None, "of the length"])
    def test_a_mask_that_the_body_cannot_compute_stays_dense(self, causal_file, tmp_path, monkeypatch, band):
        model, x = causal_file[0], wandering(130)
        recipe = recipe_for(model, x)
        monkeypatch.setattr(Causal, "band", lambda _, q_len, k_len: band and Band(q_len // 2))
        (row,) = to_onnx(model, recipe, x, tmp_path / "model.onnx").rows
        sentence = "no form in ONNX: mask causal; those that are bands aligned at the first or the last key have one"
        assert (row.outcome, row.reason) == ("dense", sentence)

    def test_without_the_extra_it_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
        with pytest.raises(ExportError, match=r"pip install 'afbs-compile\[export\]'"):
            to_onnx(Grouped().eval(), None, wandering(130), tmp_path / "model.onnx")

    @pytest.mark.parametrize("stage", ["save_model", "checker.check_model"])
    def test_an_interrupted_export_leaves_nothing(self, causal_file, tmp_path, monkeypatch, stage):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        model, recipe, _ = causal_file
        monkeypatch.setattr(f"onnx.{stage}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            to_onnx(model, recipe, wandering(130), tmp_path / "model.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_weights_that_no_onnx_file_holds(self, causal_file, tmp_path, monkeypatch):
        model, recipe, _ = causal_file
        monkeypatch.setattr("afbs_compile.export.onnx.LARGEST_FILE", 1000)
        with pytest.raises(ExportError, match="the weights take"):
            to_onnx(model, recipe, wandering(130), tmp_path / "model.onnx")
