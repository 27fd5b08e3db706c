"""A call's heads taken apart and put together; which part of them a process has; layers found by their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from afbs_compile.errors import RecipeError
from afbs_compile.kernels.call import SparseCall, fp8_constant_count
from afbs_compile.match import placed
from afbs_compile.peers import Part, PeerError, Peers, _Failure, part_of
from afbs_compile.recipe import GraphRecipe, HeadRecipe, Recipe, SampleRecord, SiteRecipe
from afbs_compile.shards import NO_SPARSE_HEAD, Heads, joined, of_part
from afbs_compile.sketch import sketched
from afbs_compile.tuner.speed import SiteSpeed, Stopwatch

DIM = 16


def site(heads: int = 8, kv_heads: int = 4, name: str = "attn", **more: Any) -> SiteRecipe:
    call = replace(SparseCall.uniform(heads, 0.9, policy="cumulant"), **more)
    call = call.with_tau(torch.arange(heads) / 10)
    measured = tuple(HeadRecipe("sparse", head / 100, 0.01, (0.01,)) for head in range(heads))
    return SiteRecipe(name, "sparse", mask="causal", head_dim=DIM, kv_heads=kv_heads, call=call, heads=measured)


class TestHeads:
    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_parts_make_the_whole_again(self, parts):
        whole = site(fp8_constants=tuple(map(float, range(fp8_constant_count(4, DIM)))))
        here = Heads(8 // parts, 4 // parts, DIM)
        rows = [(Part(number, parts), of_part("attn", whole, here, number)) for number in range(parts)]
        assert joined(rows[::-1]) == whole
        assert joined([*rows, *rows]) == whole, "several processes may have the same part"

    def test_what_is_one_for_all_heads_is_what_holds_for_all(self):
        one, other = site(4, 2, min_length=512), site(4, 2, min_length=1024)
        one, other = replace(one, validated_lengths=(100, 900)), replace(other, validated_lengths=(200, 800))
        whole = joined([(Part(0, 2), one), (Part(1, 2), other)])
        assert (whole.calibrated.min_length, whole.validated_lengths, whole.kv_heads) == (1024, (200, 800), 4)

    def test_constants_of_fp8_are_of_every_key_head(self):
        fp8 = replace(site(4, 2).calibrated, precision=("fp8",) * 4, fp8_constants=(2.0,) * fp8_constant_count(2, DIM))
        whole = joined([(Part(0, 2), site(4, 2)), (Part(1, 2), replace(site(4, 2), call=fp8))])
        assert len(whole.calibrated.fp8_constants) == fp8_constant_count(4, DIM)
        assert whole.calibrated.precision == ("own",) * 4 + ("fp8",) * 4

    def test_a_part_without_a_sparse_head_is_dense(self):
        whole = site()
        whole = replace(whole, call=whole.calibrated.with_tau(torch.tensor([0.5] * 4 + [1.0] * 4)))
        assert of_part("attn", whole, Heads(4, 2, DIM), 0).outcome == "sparse"
        mine = of_part("attn", whole, Heads(4, 2, DIM), 1)
        assert (mine.outcome, mine.reason) == ("dense", NO_SPARSE_HEAD)

    def test_heads_of_another_model_are_refused(self):
        with pytest.raises(RecipeError, match="attn has 8 heads of 16 over 4, here has 3 of 16 over 1 on each rank"):
            of_part("here", site(), Heads(3, 1, DIM), 0)


@dataclass
class Mesh:
    """A mesh as it looks to one process, without any other."""

    sizes: tuple[int, ...]
    coordinate: tuple[int, ...]

    def size(self, dim: int) -> int:
        return self.sizes[dim]

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate


def weight(shape: tuple[int, ...], mesh: Mesh, *dims: int | None) -> Any:
    placements = [SimpleNamespace() if dim is None else SimpleNamespace(dim=dim) for dim in dims]
    return SimpleNamespace(shape=shape, device_mesh=mesh, placements=placements)


class TestParts:
    def test_a_projection_that_is_cut_where_heads_are(self):
        mesh = Mesh((2,), (1,))
        assert part_of([weight((8 * DIM, 64), mesh, 0)], 4, DIM) == Part(1, 2)
        assert part_of([weight((64, 8 * DIM), mesh, 1)], 4, DIM) == Part(1, 2)

    def test_a_mesh_that_copies_weights_along_another_dimension(self):
        assert part_of([weight((8 * DIM, 64), Mesh((3, 4), (2, 1)), None, 0)], 2, DIM) == Part(1, 4)

    @pytest.mark.parametrize(
        "tensors",
        [
            [torch.zeros(8 * DIM, 64)],
            [weight((4 * DIM, 64), Mesh((2,), (1,)), 0)],  # cut, and put together before the call
            [weight((8 * DIM, 64), Mesh((2,), (1,)), None)],
        ],
        ids=["plain", "gathered", "replicated"],
    )
    def test_all_heads_are_here(self, tensors):
        assert part_of(tensors, 4, DIM) == Part()


class TestPeers:
    def test_one_process_decides_alone(self):
        peers = Peers()
        with peers.together():
            assert peers.gathered(3) == [3]
            assert peers.first(lambda: "made") == "made"
        assert peers.is_first
        assert peers.are_alone

    def test_another_one_that_failed_is_named(self, monkeypatch):
        monkeypatch.setattr(Peers, "_exchanged", lambda _, value: [value, _Failure("no memory")])
        with pytest.raises(PeerError, match="process 1 of those that share the model failed: no memory"):
            Peers().gathered(3)

    def test_the_slowest_one_decides(self, monkeypatch):
        other = SiteSpeed(2.0, 1.5, 1024)
        monkeypatch.setattr(Peers, "gathered", lambda _, value: [value, other])
        assert Stopwatch().slowest_speed(SiteSpeed(3.0, 1.0, 512)) == SiteSpeed(3.0, 1.5, 1024)
        assert Stopwatch().slowest_speed(SiteSpeed(3.0, 2.9, None)) == SiteSpeed(3.0, 2.9, None)
        assert Stopwatch().slowest_speed(None) == other, "a process whose heads are all dense has nothing to say"


def recipe_of(tensors: list[tuple[str, torch.Tensor]]) -> Recipe:
    names = ["model.layers.0.attn", "model.layers.1.attn"]
    record = SampleRecord("samples", 1, 1, (1, 1), "")
    graph = GraphRecipe("", "", "", record, 0.0, 0.0, tuple(site(name=name) for name in names), None, sketched(tensors))
    return Recipe({"tolerance": 0.1}, "cpu", "flex", 1, {}, (graph,))


def test_a_layer_is_known_by_its_weights() -> None:
    """A stage that numbers its layers from 0, by the names of a module or of a graph's inputs."""
    layers = [("model.layers.0.attn.q.weight", torch.randn(8, 8)), ("model.layers.1.attn.q.weight", torch.randn(8, 8))]
    recipe, second = recipe_of(layers), layers[1][1].clone()
    for name in ("layers.0.attn.q.weight", "l_self_modules_layers_modules_0_modules_attn_modules_q_parameters_weight_"):
        assert placed(["layers.0.attn"], sketched([(name, second)]), recipe) == {"layers.0.attn": "model.layers.1.attn"}
    assert placed(["layers.0.attn"], sketched([("layers.0.attn.q.weight", torch.randn(8, 8))]), recipe) == {}


def test_weights_that_several_layers_have_say_nothing() -> None:
    ones = torch.ones(8, 8)
    recipe = recipe_of([("model.layers.0.attn.q.weight", ones), ("model.layers.1.attn.q.weight", ones.clone())])
    assert placed(["layers.0.attn"], sketched([("layers.0.attn.q.weight", ones.clone())]), recipe) == {}
