"""A sparse call as a value: what it refuses, its parts, and the operator's arguments."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from afbs_compile.kernels.blocks import BlockShape
from afbs_compile.kernels.call import KEEP_ALL, LAMBDA_OFF, THETA_OFF, Kept, SparseCall, fp8_constant_count
from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.op import SCHEMA, arguments_of
from afbs_compile.kernels.policies.registry import POLICIES
from tests.kernels.helpers import Shape, operands_of

CALL = SparseCall(
    tau=(0.5, 0.25, 1.0, 0.75),
    theta=(0.1, THETA_OFF, THETA_OFF, THETA_OFF),
    lam=(LAMBDA_OFF, -8.0, LAMBDA_OFF, LAMBDA_OFF),
    policy=("meansim", "cumulant", "sink_window", "meanshare"),
    shape=BlockShape(128, 64),
    kept=Kept(last_rows=3, local_keys=5),
    precision=("own", "fp8", "own", "fp8"),
    fp8_constants=tuple(map(float, range(2 * 18))),
    min_length=100,
    max_length=9000,
)
OTHER = SparseCall.uniform(4, 0.9, policy="antidiagonal", shape=BlockShape(128, 64), kept=Kept(1, 2))


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        OTHER,
        SparseCall.uniform(3, 0.5),
        SparseCall.uniform(1, KEEP_ALL, theta=0.2, kept=Kept(last_rows=64)),
        SparseCall.uniform(2, 0.5, min_length=7, kept=Kept(local_keys=9)),
        SparseCall.uniform(2, 0.5, max_length=7, precision=("fp8", "fp8")),
        SparseCall.uniform(4, 0.5, shape=BlockShape(64, 32, heads=2)),
    ],
    ids=["everything", "policy", "default", "theta", "shortest", "fp8", "shared"],
)
def test_the_operators_arguments_are_the_call(call: SparseCall) -> None:
    given = call.arguments()
    assert SparseCall.of_arguments(call.heads, given) == call
    # None stands for an argument's default, and what is not the call's is not looked at.
    every = dict.fromkeys(("policy", "precision", "fp8_constants")) | given
    assert SparseCall.of_arguments(call.heads, {**every, "mask": "causal", "scale": None, "x": object()}) == call


def test_only_what_the_operator_does_not_take_by_default_is_given() -> None:
    plain = SparseCall.uniform(2, 0.5).arguments()
    assert set(plain) == {"tau", "theta", "lam", "block_q", "block_k", "min_length"}
    assert all(type(values) is list for values in (plain["tau"], plain["theta"], plain["lam"]))
    assert set(CALL.arguments()) - set(plain) == {
        "max_length", "policy", "precision", "fp8_constants", "last_rows", "local_keys",
    }  # fmt: skip
    given = arguments_of(CALL, Causal(), 0.3)
    assert (given["mask"], given["scale"]) == ("causal", 0.3)
    assert all(f" {name}" in SCHEMA for name in given)


def test_other_numbers_are_refused_as_arguments_too() -> None:
    with pytest.raises(ValueError, match="^tau has 4 constants; accepted: one for each of the 3 query heads$"):
        SparseCall.of_arguments(3, CALL.arguments())
    alone = {**SparseCall.uniform(2, 0.5).arguments(), "fp8_constants": [0.0]}
    sentence = "^fp8_constants came without precision; accepted: together with heads of precision fp8$"
    with pytest.raises(ValueError, match=sentence):
        SparseCall.of_arguments(2, alone)


def test_heads_that_share_a_selection_share_a_key_head() -> None:
    call = SparseCall.uniform(6, 0.5, shape=BlockShape(64, 64, heads=2))
    call.check_operands(operands_of(Shape(64, heads=6, kv_heads=3)))
    sentence = "^block_heads is 2 and 3 query heads share a key head; accepted: a number that divides those$"
    with pytest.raises(ValueError, match=sentence):
        call.check_operands(operands_of(Shape(64, heads=6, kv_heads=2)))


REFUSED: dict[str, dict[str, Any]] = {
    "block_heads is 3; accepted for 4 heads: 1, 2, 4": {"shape": BlockShape(128, 64, heads=3)},
    "policy is ['meansim', 'cumulant', 'sink_window', 'meanshare']; accepted: one name for each 2 heads that share a "
    "selection (block_heads)": {"shape": BlockShape(128, 64, heads=2)},
    "theta has 1 constants; accepted: one for each of the 4 query heads": {"theta": (0.1,)},
    "lam has 0 constants; accepted: one for each of the 4 query heads": {"lam": ()},
    "tau is [nan, 0.25, 1.0, 0.75]; accepted: finite numbers": {"tau": (math.nan, 0.25, 1.0, 0.75)},
    "theta is [inf, -1.0, -1.0, -1.0]; accepted: finite numbers": {"theta": (math.inf, -1.0, -1.0, -1.0)},
    "lam is [0.0, -8.0, 0.5, -1.0]; accepted: numbers at most 0 (log2 units under the running maximum)": {
        "lam": (0.0, -8.0, 0.5, -1.0)
    },
    "policy has 1 names; accepted: one for each of the 4 query heads": {"policy": ("meansim",)},
    f"policy is 'median'; accepted: {', '.join(POLICIES)}": {"policy": ("meansim", "median", "meansim", "meansim")},
    "theta is 0.1 for a head of policy cumulant; accepted: negative, only meansim has one": {
        "policy": ("cumulant", "cumulant", "meansim", "meansim")
    },
    "precision has 2 names; accepted: one for each of the 4 query heads": {"precision": ("own", "fp8")},
    "precision is 'int8'; accepted: own, fp8": {"precision": ("own", "int8", "own", "own")},
    "fp8_constants has a number that is not finite; accepted: finite numbers": {"fp8_constants": (0.0, math.inf)},
    "block_q is 96; accepted: 16, 32, 64, 128": {"shape": BlockShape(96, 32)},
    "block_k is 8; accepted: 16, 32, 64, 128": {"shape": BlockShape(64, 8)},
    "block_q is 64 and block_k is 128; accepted: block_q a multiple of block_k": {"shape": BlockShape(64, 128)},
    "last_rows is -1; accepted: 0 or more": {"kept": Kept(last_rows=-1)},
    "local_keys is -2; accepted: 0 or more": {"kept": Kept(local_keys=-2)},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_it_refuses_in_a_sentence(sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        replace(CALL, **REFUSED[sentence])


def test_operands_must_fit() -> None:
    shape = Shape(100, 16, heads=4, kv_heads=2)
    CALL.check_operands(operands_of(shape))
    assert len(CALL.fp8_constants) == fp8_constant_count(2, 16)
    sentence = "^tau has 4 constants; accepted: one for each of the 2 query heads$"
    with pytest.raises(ValueError, match=sentence):
        CALL.check_operands(operands_of(replace(shape, heads=2)))
    sentence = "^fp8_constants has 36 numbers; accepted: 68, 32 means and two peaks for each of the 2 key heads$"
    with pytest.raises(ValueError, match=sentence):
        CALL.check_operands(operands_of(replace(shape, head_dim=32)))


def test_some_heads() -> None:
    part = CALL.taken([3, 0], 2)
    assert (part.tau, part.theta, part.lam) == ((0.75, 0.5), (THETA_OFF, 0.1), (LAMBDA_OFF, LAMBDA_OFF))
    assert (part.policy, part.precision) == (("meanshare", "meansim"), ("fp8", "own"))
    assert part.fp8_constants == (*map(float, range(18, 36)), *map(float, range(18)))
    assert (part.shape, part.kept, part.min_length, part.max_length) == (CALL.shape, CALL.kept, 100, 9000)
    assert CALL.taken(range(4), 2) == CALL
    assert OTHER.taken([2], 2) == SparseCall.uniform(1, 0.9, policy="antidiagonal", shape=OTHER.shape, kept=Kept(1, 2))


def test_heads_of_one_call_beside_heads_of_another() -> None:
    mixed = CALL.where([True, False, False, True], OTHER)
    assert mixed.tau == (0.5, 0.9, 0.9, 0.75)
    assert mixed.theta == (0.1, THETA_OFF, THETA_OFF, THETA_OFF)
    assert mixed.lam == (LAMBDA_OFF,) * 4
    assert mixed.policy == ("meansim", "antidiagonal", "antidiagonal", "meanshare")
    assert mixed.precision == ("own", "own", "own", "fp8")
    assert (mixed.kept, mixed.fp8_constants, mixed.min_length) == (CALL.kept, CALL.fp8_constants, CALL.min_length)
    assert CALL.where([True] * 4, OTHER) == CALL
    with pytest.raises(ValueError, match="argument 2"):
        CALL.where([True] * 3, OTHER)


def test_what_a_call_says_of_itself() -> None:
    assert (CALL.heads, CALL.dense_heads, CALL.is_dense) == (4, (False, False, True, False), False)
    assert SparseCall.uniform(2, 1.5).is_dense
    assert (CALL.uses_lambda, OTHER.uses_lambda) == (True, False)
    assert OTHER.precision == ("own",) * 4
    assert SparseCall.uniform(2, 0.5).shape == BlockShape(64, 64)
    assert CALL.with_tau(torch.tensor([0.0, 0.5, 1.0, 2.0])).tau == (0.0, 0.5, 1.0, 2.0)
    assert len({CALL, replace(CALL), OTHER}) == 2
    with pytest.raises(FrozenInstanceError):
        CALL.tau = (0.0,) * 4


def test_lengths_that_run_dense() -> None:
    assert [CALL.dense_at(length, length) for length in (99, 100, 9000, 9001)] == [True, False, False, True]
    assert [CALL.dense_at(*lengths) for lengths in ((50, 200), (50, 199), (9000, 100), (10, 9001))] == [
        False,
        True,
        False,
        True,
    ]
    assert [OTHER.dense_at(length, length) for length in (0, 10**9)] == [False, False]
    assert SparseCall.uniform(2, KEEP_ALL).dense_at(1000, 1000)


def test_a_graph_holds_six_digits() -> None:
    call = replace(CALL, tau=(0.123456789, 1 / 3, 1.0, 2e-9 / 3), theta=(0.98765432, -1.0, -1.0, -1.0)).rounded()
    assert call.tau == (0.123457, 0.333333, 1.0, 6.66667e-10)
    assert call.theta == (0.987654, -1.0, -1.0, -1.0)
    assert (call.lam, call.fp8_constants) == (CALL.lam, CALL.fp8_constants)
