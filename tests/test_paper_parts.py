"""What the paper's other parts stand on: prompts with one true answer, statistics, curves, and the learned gate."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from afbs_compile.kernels.masks.causal import Causal
from afbs_compile.kernels.operands import Operands
from afbs_compile.tuner import speed
from afbs_compile.tuner.clock import Times

ROOT = Path(__file__).parent.parent
LENGTH = 2048
SEEDS = range(5)

transformers = pytest.importorskip("transformers")


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's modules, and the wording of pass keys that the model was trained on."""
    before = set(sys.modules)
    kernels = sys.modules.get("kernels", "absent")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paper_parts.gate
    import paper_parts.section3
    import paper_parts.table2
    import paper_parts.tasks
    import passkey

    paper_parts.passkey = passkey
    yield paper_parts
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("paper_parts", "common", "timing", "passkey"):
            del sys.modules[name]
    if kernels == "absent":
        sys.modules.pop("kernels", None)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "examples" / "model-7m")


@pytest.fixture(scope="module")
def haystack(tokenizer):
    text = " ".join(f"Line {i} speaks of nothing in particular." for i in range(LENGTH))
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


TASKS = ("pass key", "several keys", "several values", "variable tracking", "common word", "frequent words")


def made(parts, tokenizer, haystack, task, seed, length=LENGTH):
    """Facts, the prompt's ids, its answer's length, and its text before the answer."""
    draw = random.Random(seed)
    facts = parts.tasks.TASKS[task](draw)
    places = sorted(draw.random() for _ in facts.hidden)
    ids, count = parts.tasks.prompt(tokenizer, haystack, facts, length, places)
    return facts, ids, count, tokenizer.decode(ids[0, 1:-count])


def test_every_task_is_tested_here(parts):
    assert tuple(parts.tasks.TASKS) == TASKS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, LENGTH])
def test_a_prompt_has_its_length_and_ends_with_question_and_answer(parts, tokenizer, haystack, task, length):
    for seed in SEEDS:
        facts, ids, count, text = made(parts, tokenizer, haystack, task, seed, length)
        assert ids.shape == (1, length)
        assert ids[0, 0] == tokenizer.bos_token_id
        assert text.endswith(facts.question)
        assert tokenizer.decode(ids[0, -count:]) == facts.answer
        if not facts.fills:
            places = [text.index(sentence) for sentence in facts.hidden]  # each is there, in order
            assert places == sorted(places)


@pytest.mark.parametrize("task", TASKS)
def test_another_seed_asks_for_another_answer(parts, task):
    answers = [parts.tasks.TASKS[task](random.Random(seed)).answer for seed in range(20)]
    assert answers == [parts.tasks.TASKS[task](random.Random(seed)).answer for seed in range(20)]
    assert len(set(answers)) > 10


def test_pass_keys_are_worded_as_the_model_was_trained(parts):
    facts = parts.tasks.pass_key(random.Random(0))
    assert facts.hidden == (parts.passkey.NEEDLE.format(key=facts.answer),)
    assert facts.question == parts.passkey.QUESTION


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_needle_lies_where_it_is_told_to(parts, tokenizer, haystack, place):
    facts = parts.tasks.pass_key(random.Random(0))
    ids, _ = parts.tasks.prompt(tokenizer, haystack, facts, LENGTH, [place])
    needle = tokenizer(facts.hidden[0], add_special_tokens=False).input_ids
    (at,) = [i for i in range(LENGTH) if ids[0, i : i + len(needle)].tolist() == needle]
    question = len(tokenizer(facts.question + facts.answer, add_special_tokens=False).input_ids)
    assert (at - 1) / (LENGTH - 1 - question - len(needle)) == pytest.approx(place, abs=0.005)


def test_the_key_of_who_is_asked_for_is_the_answer(parts, tokenizer, haystack):
    for seed in SEEDS:
        facts, _, _, text = made(parts, tokenizer, haystack, "several keys", seed)
        keys = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", text))
        (asked,) = re.findall(r"What is the pass key of (\w+)\?", text)
        assert len(set(keys.values())) == parts.tasks.KEYS
        assert keys[asked] == facts.answer


def test_all_values_are_the_answer_in_order(parts, tokenizer, haystack):
    for seed in SEEDS:
        facts, _, _, text = made(parts, tokenizer, haystack, "several values", seed)
        assert re.findall(r"The pass key is (\d+)\.", text) == facts.answer.split(", ")


def test_the_chain_of_variables_leads_to_the_answer(parts, tokenizer, haystack):
    for seed in SEEDS:
        facts, _, _, text = made(parts, tokenizer, haystack, "variable tracking", seed)
        values: dict[str, str] = {}
        for name, old, value in re.findall(r"VAR (\w) = (?:VAR (\w)|(\d+))\.", text):
            values[name] = value or values[old]
        (asked,) = re.findall(r"What is VAR (\w)\?", text)
        assert values[asked] == facts.answer
        assert len(values) == parts.tasks.KEYS


@pytest.mark.parametrize(("task", "asked"), [("common word", 1), ("frequent words", 3)])
@pytest.mark.parametrize("length", [LENGTH, 4096, 8192])
def test_the_words_asked_for_are_the_most_frequent_of_the_text_as_it_was_cut(
    parts, tokenizer, haystack, task, asked, length
):
    for seed in SEEDS:
        facts, _, _, text = made(parts, tokenizer, haystack, task, seed, length)
        words = text.removesuffix(facts.question).split()
        words.pop()  # may be half a word
        ranked = Counter(words).most_common(asked + 1)
        assert [word for word, _ in ranked[:asked]] == facts.answer.split()
        counts = [count for _, count in ranked]
        assert len(set(counts)) == len(counts), "a tie has no answer"


def test_wilson_interval_and_mcnemar_of_known_counts(parts):
    def results(right):
        return parts.table2.Results(tuple(right), (0.0,) * len(right))

    dense, sparse = results([True] * 8 + [False] * 2), results([True] * 3 + [False] * 6 + [True])
    row = parts.table2._row("task", "method", sparse, dense, 0.7)
    assert row["lost_and_won"] == [5, 1]
    assert row["p_against_dense"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert parts.table2._row("task", "dense", dense, dense, 0.0)["interval"] == pytest.approx(
        [0.4902, 0.9433], abs=1e-4
    )
    assert parts.table2._row("task", "dense", dense, dense, 0.0)["p_against_dense"] == 1.0


def test_what_is_said_of_curves_of_known_form(parts):
    s = parts.section3.GRID[:, None]
    found = parts.section3._of_curves(torch.cat([s / 2, s / 2, 0 * s], 1), torch.cat([s, 1 - s, s], 1))
    assert found["rank_correlation"] == pytest.approx([1.0, -1.0])  # the third head's error does not move
    assert found["lipschitz"] == pytest.approx([0.5, 0.5, 0.0], abs=1e-4)
    assert found["error_at_s_1"] == pytest.approx([0.5, 0.5, 0.0])
    assert found["rising_steps"] == 1.0
    assert parts.section3._of_curves(-s, s)["rising_steps"] == 0.0


def operands(seed, length=1024, heads=2, dim=16):
    """Keys of a few directions, which queries look for: what means of blocks do not see, a map can learn."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, length, dim, generator=draw)
    topic = torch.randn(1, heads, length // 64, dim, generator=draw).repeat_interleave(64, 2)
    q[..., : dim // 2] += 3 * topic[..., : dim // 2]
    k[..., dim // 2 :] += 3 * topic[..., dim // 2 :]
    return Operands(q, k, v, Causal(), dim**-0.5)


def test_a_gate_starts_as_pooled_means_and_learns_the_weights_of_blocks(parts):
    samples = [operands(seed) for seed in range(2)]
    queries, keys, (first, last) = parts.gate.trained(samples)
    assert last < 0.9 * first
    head = parts.head.Head(samples[0].q[0, 0], samples[0].k[0, 0], samples[0].scale, torch.Generator())
    dim = head.q.shape[1]
    maps = torch.eye(dim), torch.eye(3 * dim, dim)
    start = parts.gate.scores(*maps, *parts.gate.pooled(head.q, head.k), head.scale)
    assert torch.equal(parts.head.largest(start, 0.7), parts.gate.by_means(head, 0.7))
    assert not torch.equal(queries[0], maps[0])
    assert not torch.equal(keys[0], maps[1])


def test_a_gate_keeps_what_it_says_and_knows_no_later_block(parts):
    first, change = operands(0), 640
    q, k = first.q[0, 0].clone(), first.k[0, 0].clone()
    maps = torch.randn(16, 16), torch.randn(48, 16)
    before = parts.head.largest(parts.gate.scores(*maps, *parts.gate.pooled(q, k), 0.25), 0.7)
    q[change:], k[change:] = torch.randn(2, len(q) - change, 16)
    after = parts.head.largest(parts.gate.scores(*maps, *parts.gate.pooled(q, k), 0.25), 0.7)
    rows = change // 64
    assert torch.equal(before[:rows], after[:rows])
    assert not torch.equal(before[rows:], after[rows:])
    assert not before.triu(1).any()
    assert 1 - float(before.sum()) / (16 * 17 / 2) == pytest.approx(0.7, abs=0.02)


@pytest.mark.slow
def test_thresholds_of_two_runs_agree(parts, monkeypatch):
    """What is chosen by time would not."""
    import argparse

    from paper_parts.setting import Setting

    given = argparse.Namespace(
        model=ROOT / "examples" / "model-7m", texts=["topics"], dtype="float32", length=512, windows=1, samples=2
    )
    found = []
    for sparse_ms in (1.0, 5.0):  # behind calls that are dense later ones would be calibrated on other inputs
        monkeypatch.setattr(
            speed, "timed", lambda calls, ms=sparse_ms, **_: Times((2.0, ms)[-len(calls) :], busy=False)
        )
        found.append(Setting(given).recipe(tolerance=0.055, min_length=256))
    first, second = found
    assert [site.calibrated.tau for site in first.sites] == [site.calibrated.tau for site in second.sites]
    assert {str(site.calibrated.shape) for site in first.sites if site.heads} == {"64x64"}
