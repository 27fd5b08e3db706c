"""Engines of TensorRT for RTX, really parsed and built, without a GPU. None is run: there is none here that could."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from afbs_compile.cli.verify import _program
from afbs_compile.errors import ExportError, OptionError
from afbs_compile.export import load, to_onnx, to_tensorrt_rtx
from afbs_compile.export.onnx_function import bodies
from afbs_compile.export.rtx_build import BINDINGS, build
from afbs_compile.export.rtx_plugin import arguments_of_fields, compute
from afbs_compile.export.tensorrt_rtx import program_beside, program_of
from afbs_compile.kernels.op import sparse_attention
from tests.export.helpers import Grouped, recipe_for, reference_by_hand, relative_difference, wandering

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
MODEL = Path(__file__).parent.parent.parent / "examples" / "model-7m"
built_here = pytest.mark.skipif(
    importlib.util.find_spec(BINDINGS) is None, reason="the extra tensorrt-rtx is not installed; make test-tensorrt"
)


def language_model(dtype, layers):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, num_hidden_layers=layers).eval()
    example = {"input_ids": torch.randint(3, 8192, (1, 512), generator=torch.Generator().manual_seed(0))}
    return model, recipe_for(model, example, tau=0.8, min_length=256, policy="cumulant"), example


@built_here
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 8), (torch.float16, 1), (torch.bfloat16, 1)])
def test_the_shipped_model(tmp_path, dtype, layers):
    model, recipe, example = language_model(dtype, layers)
    engine = tmp_path / "model.engine"
    written = to_tensorrt_rtx(model, recipe, example, engine)
    assert [row.outcome for row in written.rows] == ["sparse"] * layers
    content = engine.read_bytes()
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert len(content) > weights / 2, "embeddings are tied"
    for layer in range(layers):
        assert f"node_sparse_attention{f'_{layer}' if layer else ''}".encode() in content
    if dtype == torch.float32:
        (logits,) = load(program_of(engine))(**example)
        with torch.no_grad():
            assert 1e-4 < relative_difference(logits, model(**example).logits) < 1


@built_here
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_range_of_lengths(tmp_path, dtype):
    model, recipe, example = language_model(dtype, 1)
    to_onnx(model, recipe, example, tmp_path / "model.onnx", dynamic=True)
    ranges = {"input_ids": ((1, 1024), (1, 2048), (1, 4096))}
    built = build(tmp_path / "model.onnx", tmp_path / "model.engine", ranges, plugin=False)
    assert built["layers"] > 1000
    assert built["plugins"] == 0
    assert (tmp_path / "model.engine").stat().st_size > 2**20


@built_here
@pytest.mark.parametrize("opset", range(18, 24))
def test_every_opset_and_policies_that_not_every_call_has(tmp_path, opset):
    x = wandering(130)
    model = torch.nn.Sequential(Grouped(), Grouped(causal=False)).eval()
    recipe = recipe_for(model, x, tau=0.6, policy=["meansim", "cumulant", "sink_window", "vertical_slash"])
    to_onnx(model, recipe, x, tmp_path / "model.onnx", opset=opset)
    assert build(tmp_path / "model.onnx", tmp_path / "model.engine", {}, plugin=False)["layers"] > 1000


@built_here
def test_each_call_is_a_plugin_with_its_arguments(tmp_path):
    model, x = Grouped().eval(), wandering(130)
    recipe = recipe_for(model, x, tau=[0.3, 0.6, 0.9, 1.0], policy=["meansim", "cumulant"] * 2)
    engine = tmp_path / "model.engine"
    to_tensorrt_rtx(model, recipe, x, engine, dynamic=True, plugin=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.engine", "model.engine.onnx"]
    content = engine.read_bytes()
    begin = content.index(b'{"scale": 0.25')
    told = json.JSONDecoder().raw_decode(content[begin : begin + 2000].decode(errors="replace"))[0]
    assert told["policy"] == ["meansim", "cumulant"] * 2
    assert told["tau"] == pytest.approx([0.3, 0.6, 0.9, 1.0])
    assert (told["mask"], told["block_q"], told["given"]) == ("causal", 64, [])
    (out,) = load(program_of(engine))(x)
    with reference_by_hand(recipe):
        assert relative_difference(out, model(x)) < 1e-4


@built_here
def test_what_tensorrt_refuses_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="TensorRT for RTX cannot build the engine: "):
        build(tmp_path / "model.onnx", tmp_path / "model.engine", {}, plugin=False)
    assert not (tmp_path / "model.engine").exists()


FIELDS = {
    "tau": [0.5, 0.7], "theta": [-1.0, 0.25], "lam": [-1000.0, -1000.0], "scale": 0.25, "block_q": 32, "block_k": 16,
    "block_heads": 1, "min_length": 0, "max_length": 0, "last_rows": 8, "local_keys": 4,
}  # fmt: skip


def fields(**more):
    arrays = {name: np.array(value if isinstance(value, list) else [value]) for name, value in FIELDS.items()}
    texts = {"policy": b"cumulant\0meansim\0", "mask": b"causal\0"}
    arrays |= {name: np.frombuffer(text, dtype=np.int8) for name, text in texts.items()}
    return arrays | {name: np.array([value]) for name, value in more.items()}


@pytest.mark.parametrize("dense", [None, 0, 1])
def test_a_plugin_computes_what_the_operator_does(dense):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 16) for heads in (2, 1, 1))
    told = {**FIELDS, "policy": ["cumulant", "meansim"], "mask": "causal"}
    masked = dense is not None
    further = (torch.rand(1, 200) < 0.9, torch.randn(1, 1, 200, 200), torch.ones(2)) if masked else ()
    if masked:
        told |= {"valid": further[0], "sinks": further[2], "softcap": 2.0}
    if dense:
        told["attn_mask"] = further[1]
    out = torch.empty(1, 2, 200, 16)
    arguments = arguments_of_fields(fields(dense=dense, softcap=2.0) if masked else fields(), masked)
    compute(json.dumps(arguments), (q, k, v, *further), out)
    torch.testing.assert_close(out, sparse_attention(q, k, v, **told))


def test_a_body_has_no_branch_that_a_constant_decides(tmp_path):
    model, x = Grouped().eval(), wandering(130)
    to_onnx(model, recipe_for(model, x), x, tmp_path / "model.onnx")
    (body,) = onnx.load(tmp_path / "model.onnx").functions
    kinds: list[str] = []

    def walk(nodes):
        for node in nodes:
            kinds.append(node.op_type)
            assert node.domain == ""
            for attribute in node.attribute:
                walk(attribute.g.node)

    walk(body.node)
    assert kinds.count("If") == 1, "whether anything of v is NaN"
    assert "NonZero" not in kinds


def test_no_nodes_no_bodies():
    assert bodies(20, []) == []


def test_an_engine_belongs_to_the_program_beside_it(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine")
    with pytest.raises(ExportError, match="is not beside it"):
        program_of(engine)
    model, x = Grouped().eval(), wandering(130)
    to_onnx(model, recipe_for(model, x), x, program_beside(engine))
    with pytest.raises(ExportError, match="is not the engine that was built from"):
        program_of(engine)
    with pytest.raises(ExportError, match="is run by TensorRT for RTX, not by this package"):
        load(engine)


def test_verify_says_what_it_could_not_check(tmp_path, monkeypatch):
    program = tmp_path / "model.engine.onnx"
    monkeypatch.setattr("afbs_compile.cli.verify.program_of", lambda path: program)
    found, checks = _program(tmp_path / "model.engine")
    assert found == program
    assert [(check.name, check.passed) for check in checks] == [("engine", True), ("engine runs", None)]
    assert "compute capability 7.5, 8.x and 12.x" in checks[1].detail


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, BINDINGS, None)
    sentence = rf"^{BINDINGS} is not installed; pip install 'afbs-compile\[tensorrt-rtx\]'"
    with pytest.raises(ExportError, match=sentence):
        to_tensorrt_rtx(Grouped().eval(), None, wandering(130), tmp_path / "model.engine")
    with pytest.raises(OptionError, match=r"accepted for tensorrt-rtx: a file name that ends in \.engine"):
        to_tensorrt_rtx(Grouped().eval(), None, wandering(130), tmp_path / "model.ep")
    assert list(tmp_path.iterdir()) == []
