"""A policy, a mask, an engine and an option, each added from this file alone, and each through the whole package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import afbs_compile
from afbs_compile.backend import afbs
from afbs_compile.cache import cache_folder
from afbs_compile.cli.main import main
from afbs_compile.errors import OptionError
from afbs_compile.export import load, to_onnx
from afbs_compile.kernels.attend.engine import Engine
from afbs_compile.kernels.attend.engines import ENGINES
from afbs_compile.kernels.blocks import BlockLists, BlockShape, live_of
from afbs_compile.kernels.call import SparseCall
from afbs_compile.kernels.masks.base import Mask
from afbs_compile.kernels.masks.registry import MASKS
from afbs_compile.kernels.operands import Operands
from afbs_compile.kernels.policies.base import OnnxBody, Policy
from afbs_compile.kernels.policies.registry import POLICIES
from afbs_compile.kernels.select import plain
from afbs_compile.kernels.spec.attention import masked_attention
from afbs_compile.options import OPTIONS, Option, Options, one_of
from afbs_compile.recipe import Recipe
from tests.toy import HEAD_DIM, HEADS, Toy, drifting

LENGTH = 768
TOLERANCE = 0.2


def calibrated(model, path, **options) -> Recipe:
    """The model's recipe, through its file."""
    afbs_compile.calibrate(model, [drifting(LENGTH)], tolerance=TOLERANCE, min_length=128, **options).save(path)
    return Recipe.load(path)


def compiled(model, recipe):
    return torch.compile(model, backend="afbs", options={"recipe": recipe, "min_length": 1})


class NearestFirst(Policy):
    """Strength falls with the distance between blocks."""

    name = "nearest_first"
    rule = "strength"
    explored = (-1.0,)
    onnx = OnnxBody(
        "NearestFirst",
        ("""
NearestFirst (q, k, formula, valid, mask, blurred, bias, scaling, softcap, capped, by_mask, with_bias, size_q, size_k)
    => (scores)
{
    zero = Constant <value = int64 {0}> ()
    column = Constant <value = int64[1] {-1}> ()
    starts_axis = Constant <value = int64[1] {2}> ()
    q_len1 = Shape <start = 2, end = 3> (q)
    k_len1 = Shape <start = 2, end = 3> (k)
    q_len = Squeeze (q_len1)
    k_len = Squeeze (k_len1)
    first_q_flat = Range (zero, q_len, size_q)
    first_q = Unsqueeze (first_q_flat, column)
    first_k = Range (zero, k_len, size_k)
    apart = Sub (first_q, first_k)
    apart_float = Cast <to = 1> (apart)
    distance = Abs (apart_float)
    minus = Constant <value = float {-0.00390625}> ()
    scores_2d = Mul (distance, minus)
    batch_heads = Shape <start = 0, end = 2> (q)
    blocks = Shape (scores_2d)
    shape = Concat <axis = 0> (batch_heads, blocks)
    scores = Expand (scores_2d, shape)
}
""",),
    )  # fmt: skip

    def scores(self, operands: Operands, shape: BlockShape) -> Tensor:
        grid = operands.grid(shape)
        first_q = torch.arange(grid.count_q)[:, None] * shape.q
        first_k = torch.arange(grid.count_k) * shape.k
        scores = (first_q - first_k).abs().float() * -(2.0**-8)
        return scores.expand(*operands.q.shape[:2], -1, -1)


@torch.no_grad()
@pytest.mark.slow
def test_a_policy(monkeypatch, tmp_path, fresh_dynamo, sparse_is_faster):
    for policy in POLICIES.values():
        monkeypatch.setattr(type(policy), "explored", ())
    monkeypatch.setitem(POLICIES, NearestFirst.name, NearestFirst())
    model, x = Toy().eval(), drifting(LENGTH)
    recipe = calibrated(model, tmp_path / "toy.json")
    assert {name for site in recipe.sites for name in site.calibrated.policy} == {NearestFirst.name}
    assert all(site.outcome == "sparse" and site.sparsity > 0.05 for site in recipe.sites)
    sparse = compiled(model, recipe)
    out = sparse(x)
    assert NearestFirst.name in afbs_compile.explain(sparse).after[0]
    written = to_onnx(model, recipe, (x,), tmp_path / "toy.onnx")
    assert [row.outcome for row in written.rows] == ["sparse", "sparse"]
    torch.testing.assert_close(load(tmp_path / "toy.onnx")(x)[0], out, rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Dilated(Mask):
    """A row sees every ``step``-th key up to its own."""

    step: int
    name = "dilated"
    words = "dilated"
    local = True

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        return (keys <= positions) & ((positions - keys) % self.step == 0)

    @classmethod
    def proposed(cls, seen: Tensor) -> Iterable[Mask]:
        gaps = seen[-1].nonzero()[:, 0].diff()
        return [cls(int(gaps[0]))] if len(gaps) and int(gaps[0]) > 1 else []


class DilatedToy(Toy):
    """The toy under a mask that its graph makes of constants."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1])
        seen = (rows <= rows[:, None]) & ((rows[:, None] - rows) % 2 == 0)
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q * layer.sharpness, k, v, attn_mask=seen)
            x = x + 0.1 * layer.out(out.transpose(1, 2).flatten(2))
        return x


@torch.no_grad()
@pytest.mark.slow
def test_a_mask(monkeypatch, tmp_path, fresh_dynamo, sparse_is_faster):
    model, x = DilatedToy().eval(), drifting(LENGTH)
    unknown = afbs_compile.calibrate(model, [x], tolerance=TOLERANCE, min_length=128)
    assert {site.mask for site in unknown.sites} == {"full"}  # it is read when the graph runs
    torch._dynamo.reset()
    monkeypatch.setitem(MASKS, Dilated.name, Dilated)
    recipe = calibrated(model, tmp_path / "toy.json")
    assert [site.mask for site in recipe.sites] == ["dilated(2)", "dilated(2)"]
    assert all(site.outcome == "sparse" and site.sparsity > 0.05 for site in recipe.sites)
    torch._dynamo.reset()
    sparse = compiled(model, recipe)
    out, dense = sparse(x), model(x)
    assert "mask = 'dilated(2)'" in afbs_compile.explain(sparse).after[0]
    assert 0 < float((out - dense).abs().sum() / dense.abs().sum()) < TOLERANCE

    call, shape = recipe.sites[0].calibrated, (1, HEADS, LENGTH, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    operands = Operands(q, k, v, Dilated(2), 0.2)
    single = replace(operands, q=q.float(), k=k.float(), v=v.float())
    live = live_of(plain.select(single, call))
    arguments = {**call.arguments(), "mask": "dilated(2)", "scale": 0.2}
    out = torch.ops.afbs.sparse_attention(q.float(), k.float(), v.float(), **arguments)
    torch.testing.assert_close(
        out.double(), masked_attention(operands, live, call.lam, call.shape), rtol=1e-4, atol=1e-5
    )
    # A row's result does not change with a key that it does not see: the one right before it.
    k[:, :, -2], v[:, :, -2] = 100.0, 100.0
    other = torch.ops.afbs.sparse_attention(q.float(), k.float(), v.float(), **arguments)
    torch.testing.assert_close(other[:, :, -1], out[:, :, -1])


class Abacus(Engine):
    """The specification as an engine; it does not take a block shape of 32."""

    name = "abacus"
    title = "the abacus"
    family = "beads"
    shapes = (BlockShape(64, 64),)

    def serves(self, device: torch.device) -> bool:
        return True

    def refusal(self, operands: Operands, call: SparseCall) -> str | None:
        return None if call.shape.rows == (64, 64) else f"blocks are {call.shape}; accepted: 64x64"

    def select(self, operands: Operands, call: SparseCall) -> BlockLists:
        return plain.select(operands, call)

    def attend(self, operands: Operands, call: SparseCall, lists: BlockLists, out: Tensor) -> None:
        out.copy_(masked_attention(operands, live_of(lists), call.lam, call.shape))

    def layout(self, operands: Operands, call: SparseCall) -> str:
        return f"abacus {call.shape}"


@torch.no_grad()
def test_an_engine(monkeypatch, tmp_path, fresh_dynamo, sparse_is_faster):
    monkeypatch.setattr("afbs_compile.kernels.attend.engines.ENGINES", ENGINES[:])  # what is inserted goes again
    from afbs_compile.kernels.attend import engines

    engines.ENGINES.insert(0, Abacus())
    model, x = Toy().eval(), drifting(LENGTH)
    recipe = calibrated(model, tmp_path / "toy.json")
    assert recipe.engine == "beads"
    assert [site.kernel for site in recipe.sites] == ["abacus 64x64"] * 2
    sparse = compiled(model, recipe)
    sparse(x)
    assert {row.kernel for row in afbs_compile.explain(sparse).rows} == {"abacus 64x64"}
    smaller = replace(
        recipe,
        graphs=tuple(
            replace(g, sites=tuple(replace(s, call=replace(s.calibrated, shape=BlockShape(32, 32))) for s in g.sites))
            for g in recipe.graphs
        ),
    )
    torch._dynamo.reset()
    sparse = compiled(model, smaller)
    sparse(x)
    said = "not the abacus: blocks are 32x32; accepted: 64x64"
    assert {(row.kernel, row.kernel_reason) for row in afbs_compile.explain(sparse).rows} == {
        ("flex 32x32 tiles", said)
    }
    assert said in str(afbs_compile.explain(sparse)).replace("\n", "")


COLOUR = Option(
    "colour",
    "red",
    "What the thresholds are painted in.",
    (one_of(("red", "blue")),),
    calibrates=True,
    runs=False,
    flag="--colour",
)


@torch.no_grad()
def test_an_option(monkeypatch, tmp_path, fresh_dynamo, sparse_is_faster, capsys):
    with pytest.raises(OptionError, match="unknown option 'colour'"):
        afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], colour="blue")
    monkeypatch.setitem(OPTIONS, COLOUR.name, COLOUR)
    with pytest.raises(OptionError, match="colour: got 'green'; accepted: 'red' or 'blue'"):
        afbs_compile.calibrate(Toy().eval(), [drifting(LENGTH)], colour="green")
    with pytest.raises(OptionError, match="colour: not accepted together with recipe"):
        Options.parse({"colour": "blue", "recipe": "r.json"})
    recipe = calibrated(Toy().eval(), tmp_path / "toy.json", colour="blue")
    assert recipe.options["colour"] == "blue"

    files = []
    for colour in ("red", "blue"):  # of another colour no cached recipe is reused
        torch._dynamo.reset()
        options = {"tolerance": TOLERANCE, "min_length": 128, "colour": colour}
        torch.compile(Toy().eval(), backend=afbs, options=options)(drifting(LENGTH))
        files.append(len(list(cache_folder().glob("*.json"))))
    assert files == [1, 2]

    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    assert "--colour" in capsys.readouterr().out
