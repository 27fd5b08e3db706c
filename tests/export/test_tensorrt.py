"""TensorRT up to the library: torch-tensorrt's own plugin generator where its files are, else its documented interface.

No TensorRT runs here. What stands below torch-tensorrt's calls is replaced: ``tensorrt.plugin`` by a recorder, and
``torch_tensorrt.dynamo.compile`` by one that keeps the program as it is.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from afbs_compile.errors import ExportError
from afbs_compile.export import load, tensorrt, to_tensorrt
from afbs_compile.kernels.op import sparse_attention
from tests.export.helpers import Grouped, recipe_for, reference_by_hand, relative_difference, wandering

OPERATOR = torch.ops.afbs.sparse_attention_plugin.default


class Input:
    """The keyword arguments of ``torch_tensorrt.Input``."""

    def __init__(self, **given):
        vars(self).update(given)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for torch_tensorrt that records what it is asked and saves with torch.export."""
    asked: dict[str, Any] = {}
    package = types.ModuleType("torch_tensorrt")
    package.Input = Input
    package.dynamo = types.SimpleNamespace(compile=lambda program, **given: asked.update(given) or program)

    def save(program, path, *, output_format, retrace, extra_files):
        assert (output_format, retrace) == ("exported_program", False)
        torch.export.save(program, path, extra_files=extra_files)

    package.save, package.load = save, torch.export.load
    plugins = types.ModuleType("torch_tensorrt.dynamo.conversion.plugins")
    plugins.custom_op = lambda name, **given: asked.setdefault("plugins", []).append((name, given))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo.conversion.plugins", plugins)
    monkeypatch.setattr(tensorrt, "register_plugin", tensorrt.register_plugin.__wrapped__)
    return asked


def test_the_program_that_the_library_gets(library, tmp_path, grouped):
    x = wandering(130)
    recipe = recipe_for(grouped, x, tau=[0.3, 0.6, 0.9, 1.0], theta=0.3, min_length=64)
    written = to_tensorrt(grouped, recipe, x, tmp_path / "model.ep", dynamic=True)
    assert [row.outcome for row in written.rows] == ["sparse"]
    assert library["plugins"] == [
        (name, {"supports_dynamic_shapes": True})
        for name in ("afbs::sparse_attention_plugin", "afbs::masked_sparse_attention_plugin")
    ]
    (given,) = library["arg_inputs"]
    assert (given.min_shape, given.opt_shape, given.max_shape) == ((1, 1, 64), (1, 130, 64), (1, 130, 64))
    program = torch.export.load(tmp_path / "model.ep")
    (node,) = program.graph.find_nodes(op="call_function", target=OPERATOR)
    assert node.kwargs == {}, "the generated converter reads positional arguments only"
    (text,) = node.args[3:]
    assert json.loads(text) == {
        "tau": [0.3, 0.6, 0.9, 1.0], "theta": [0.3] * 4, "lam": [-1000.0] * 4, "scale": 0.25, "block_q": 64,
        "block_k": 64, "min_length": 64, "mask": "causal" if grouped.causal else "full",
    }  # fmt: skip
    run = load(tmp_path / "model.ep")
    assert run.recipe == recipe
    for batch, length in ((2, 130), (1, 64), (1, 20)):
        x = wandering(length, batch, seed=1)
        (out,) = run(x)
        with reference_by_hand(recipe):
            assert relative_difference(out, grouped(x)) < 1e-5


def test_each_head_keeps_its_policy(library, tmp_path, grouped):
    names = ["meansim", "cumulant", "sink_window", "meanshare"]
    recipe = recipe_for(grouped, wandering(130), tau=[0.6, 0.8, 0.05, 0.8], policy=names)
    to_tensorrt(grouped, recipe, wandering(500), tmp_path / "model.ep")
    x = wandering(500, seed=1)
    (out,) = load(tmp_path / "model.ep")(x)
    with reference_by_hand(recipe):
        assert relative_difference(out, grouped(x)) < 1e-5


def test_a_program_of_fixed_size(library, tmp_path):
    model, x = Grouped().eval(), wandering(130)
    to_tensorrt(model, recipe_for(model, x), {"x": x}, tmp_path / "model.ep")
    assert vars(library["kwarg_inputs"]["x"]) == {"shape": (1, 130, 64), "dtype": torch.float32, "name": "x"}


def test_the_operator_is_the_sparse_one_with_its_arguments_as_text():
    q, k, v = (torch.randn(1, heads, 200, 16) for heads in (4, 2, 2))
    given = {"tau": [0.1 + 0.2, 1 / 3, 0.9, 1.0], "theta": [-1.0, 0.2, 0.3, 1e-7], "lam": [-1000.0] * 4}
    given |= {"mask": "causal", "scale": 0.1 + 0.2}
    text = json.dumps(given)
    assert json.loads(text) == given
    out = OPERATOR(q, k, v, text)
    assert out.is_contiguous()
    assert torch.equal(out, sparse_attention(q, k, v, **given))
    torch.library.opcheck(OPERATOR, (q, k, v, text))


@pytest.mark.slow
def test_every_argument_of_a_call_reaches_the_operator():
    q, k, v = (torch.randn(1, heads, 200, 16) for heads in (8, 4, 4))
    given = {
        "tau": [0.3] * 7 + [0.9], "theta": [0.2] + [-1.0] * 7, "lam": [-1000.0] * 8, "mask": "causal",
        "scale": 0.3, "block_q": 32, "block_k": 16, "block_heads": 2, "min_length": 5, "max_length": 250,
        "policy": [name for name in ("meansim", "cumulant", "sink_window", "meanshare") for _ in range(2)],
        "last_rows": 20, "local_keys": 40,
    }  # fmt: skip
    known = {argument.name for argument in torch.ops.afbs.sparse_attention.default._schema.arguments}
    tensors = {"valid", "attn_mask", "sinks"}  # of the other plugin
    refused = {"precision", "fp8_constants"}  # before a graph has them
    assert known == {"q", "k", "v", "softcap", *given, *tensors, *refused}

    def converted(**changed):
        graph = torch.fx.Graph()
        operands = [graph.placeholder(name) for name in "qkv"]
        node = graph.call_function(torch.ops.afbs.sparse_attention.default, tuple(operands), {**given, **changed})
        node.meta["val"] = torch.empty_like(q)
        graph.output(node)
        gm = torch.fx.GraphModule({}, graph)
        assert tensorrt.call_plugins(gm) == 1
        (plugin,) = gm.graph.find_nodes(op="call_function", target=OPERATOR)
        assert plugin.kwargs == {}
        return gm(q, k, v)

    seen = [converted()]
    assert torch.equal(seen[0], sparse_attention(q, k, v, **given))
    for changed in (
        {"tau": [0.3] * 8}, {"theta": [-1.0] * 8}, {"mask": "full"}, {"scale": 0.2}, {"block_q": 16},
        {"block_k": 32}, {"block_heads": 1}, {"min_length": 201}, {"max_length": 199},
        {"policy": ["meansim"] * 8, "theta": [-1.0] * 8}, {"last_rows": 0}, {"local_keys": 0}, {"softcap": 0.5},
    ):  # fmt: skip
        seen.append(converted(**changed))
        assert torch.equal(seen[-1], sparse_attention(q, k, v, **{**given, **changed})), changed
        assert not torch.equal(seen[-1], seen[0]), changed


@pytest.mark.parametrize("there", [("valid",), ("attn_mask",), ("sinks",), ("valid", "attn_mask", "sinks")])
def test_further_tensors_reach_the_operator(there):
    q, k, v = (torch.randn(1, heads, 200, 16) for heads in (4, 2, 2))
    extras = {"valid": torch.rand(1, 200) < 0.8, "attn_mask": torch.randn(200, 200)[None, None], "sinks": torch.ones(4)}
    extras = {name: extras[name] for name in there}
    given = {
        "tau": [0.5] * 4,
        "theta": [-1.0] * 4,
        "lam": [-1000.0] * 4,
        "mask": "causal",
        "scale": 0.3,
        "softcap": 2.0,
    }
    graph = torch.fx.Graph()
    operands = [graph.placeholder(name) for name in "qkv"]
    named = {name: graph.placeholder(name) for name in there}
    node = graph.call_function(torch.ops.afbs.sparse_attention.default, tuple(operands), {**given, **named})
    node.meta["val"] = torch.empty_like(q)
    graph.output(node)
    gm = torch.fx.GraphModule({}, graph)
    assert tensorrt.call_plugins(gm) == 1
    masked = torch.ops.afbs.masked_sparse_attention_plugin.default
    (plugin,) = gm.graph.find_nodes(op="call_function", target=masked)
    assert plugin.kwargs == {}
    assert torch.equal(gm(q, k, v, *extras.values()), sparse_attention(q, k, v, **given, **extras))


def test_heads_in_fp8_are_refused():
    graph = torch.fx.Graph()
    constants = {"tau": [0.5], "theta": [-1.0], "lam": [-1000.0], "mask": "causal", "scale": 0.3}
    operands = tuple(graph.placeholder(name) for name in "qkv")
    graph.call_function(torch.ops.afbs.sparse_attention.default, operands, {**constants, "precision": ["fp8"]})
    with pytest.raises(ExportError, match="the plugin takes no heads in FP8"):
        tensorrt.call_plugins(torch.fx.GraphModule({}, graph))


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(ExportError, match=r"^torch_tensorrt is not installed; pip install 'afbs-compile\[tensorrt\]'"):
        to_tensorrt(Grouped().eval(), None, wandering(130), tmp_path / "model.ep")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("no engine"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_failed_build_leaves_nothing(library, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["torch_tensorrt"], "save", fail)
    model, x = Grouped().eval(), wandering(130)
    with pytest.raises((ExportError, KeyboardInterrupt), match="^$|cannot build the engines: no engine"):
        to_tensorrt(model, recipe_for(model, x), x, tmp_path / "model.ep")
    assert list(tmp_path.iterdir()) == []


class TestGenerator:
    """torch-tensorrt's real generator of plugins, over a recorder in place of ``tensorrt.plugin``."""

    @pytest.fixture
    def generated(self, monkeypatch):
        found = importlib.util.find_spec("torch_tensorrt")
        if found is None:
            pytest.skip("the extra tensorrt is not installed")
        recorder = Recorder("tensorrt.plugin")
        features = types.ModuleType("torch_tensorrt._features")
        features.needs_qdp_plugin = lambda function: function
        parents = {name: types.ModuleType(name) for name in ("tensorrt", "torch_tensorrt")}
        parents["tensorrt"].plugin = recorder
        for name, module in {**parents, "tensorrt.plugin": recorder, "torch_tensorrt._features": features}.items():
            monkeypatch.setitem(sys.modules, name, module)
        path = Path(found.origin).parent / "dynamo" / "conversion" / "plugins" / "_generate_plugin.py"
        spec = importlib.util.spec_from_file_location("generate_plugin_of_torch_tensorrt", path)
        generator = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(generator)
        return generator, recorder

    def test_it_takes_the_plugin_operator(self, generated):
        generator, recorder = generated
        generator.generate_plugin(tensorrt.PLUGIN)
        described = recorder.described[tensorrt.PLUGIN]
        inputs = [Descriptor(["b", heads, "n", 64]) for heads in (4, 2, 2)]
        (out,) = described(*inputs, "{}")
        assert list(out.shape_expr) == ["b", 4, "n", 64]
        assert described.__annotations__["arguments"] is str
        assert tensorrt.PLUGIN in recorder.implemented

    def test_it_takes_the_masked_one(self, generated):
        generator, recorder = generated
        generator.generate_plugin(tensorrt.MASKED_PLUGIN)
        described = recorder.described[tensorrt.MASKED_PLUGIN]
        inputs = [Descriptor(["b", heads, "n", 64]) for heads in (4, 2, 2)]
        (out,) = described(*inputs, *(Descriptor(shape) for shape in (["b", "n"], [1, 1, "n", "n"], [4])), "{}")
        assert list(out.shape_expr) == ["b", 4, "n", 64]
        assert tensorrt.MASKED_PLUGIN in recorder.implemented

    def test_it_refuses_the_operator_of_the_graphs(self, generated):
        """Why there is another operator for it."""
        generator, _ = generated
        with pytest.raises(ValueError, match="arg type is not handled"):
            generator.generate_plugin("afbs::sparse_attention")


class Descriptor:
    """What the generator reads of ``tensorrt.plugin.TensorDesc``."""

    def __init__(self, shape):
        self.shape_expr, self.ndim = shape, len(shape)

    def like(self):
        return Descriptor(list(self.shape_expr))


class Recorder(types.ModuleType):
    """The decorators of ``tensorrt.plugin``."""

    TensorDesc = Descriptor
    Tensor = type("Tensor", (), {})

    def __init__(self, name):
        super().__init__(name)
        self.described, self.implemented = {}, {}

    def ShapeExprs(self, count):
        return [None] * count

    def register(self, name):
        return lambda function: self.described.setdefault(name, function)

    def impl(self, name):
        return lambda function: self.implemented.setdefault(name, function)
