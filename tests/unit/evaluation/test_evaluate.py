"""Intervals and pass@k against their definitions; batches, which may not change a thing."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from unmaskrl.core.rng import named_generator
from unmaskrl.core.rollouts import LocalRollouts
from unmaskrl.core.types import Rollout
from unmaskrl.evaluation.evaluate import (
    EvalItem,
    EvalRequest,
    EvalResult,
    batches_by_length,
    decode_blank,
    evaluate,
    evaluated_rows,
    wilson,
)
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import ASSETS
from unmaskrl.models.tokenizer import decode_texts, encode_prompt, load_tokenizer
from unmaskrl.recipes.schema import DecodeConfig
from unmaskrl.tasks import BaseTask, Example, Grade, load
from unmaskrl.training.log import log_eval


def result(groups: list[list[bool]]) -> EvalResult:
    items = [
        EvalItem(id=str(g), correct=c, text="", nfe=4, num_tokens=6, kind="ab"[g % 2])
        for g, row in enumerate(groups)
        for c in row
    ]
    return EvalResult(items=items, samples=len(groups[0]), seconds=1.0, decode={})


@pytest.mark.parametrize(("share", "n"), [(0.0, 20), (0.094, 512), (0.5, 10), (1.0, 7)])
def test_wilson_solves_its_quadratic(share: float, n: int) -> None:
    """The bounds are the p at which |share - p| = z sqrt(p (1 - p) / n)."""
    for bound in wilson(share, n):
        assert (share - bound) ** 2 == pytest.approx(
            1.959964**2 * bound * (1 - bound) / n, abs=1e-12
        )


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_pass_at_k_is_the_mean_over_subsets() -> None:
    groups = [[True, False, False, True], [False] * 4, [True] * 4, [False, True, False, False]]
    for k in (1, 2, 3, 4):
        brute = [any(c) for row in groups for c in combinations(row, k)]
        assert result(groups).pass_at(k) == pytest.approx(sum(brute) / len(brute))
    with pytest.raises(ValueError, match="at least 5"):
        result(groups).pass_at(5)


def test_summary_by_kind_and_interval_over_problems() -> None:
    summary = result([[True, True], [False, True]]).summary()
    assert (
        summary["accuracy"] == 0.75
        and summary["accuracy_a"] == 1.0
        and summary["accuracy_b"] == 0.5
    )
    assert summary["nfe"] == 4 and summary["tokens_per_call"] == 1.5
    assert (summary["accuracy_low"], summary["accuracy_high"]) == wilson(0.75, 2)


def test_batches_hold_prompts_of_similar_length() -> None:
    assert batches_by_length([5, 3, 5, 3, 4], 2) == [[1, 3], [4, 0], [2]]
    assert batches_by_length([2, 2, 2], 2) == [[0, 1], [2]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        batches_by_length([2], 0)


@pytest.fixture(scope="module")
def mini() -> tuple:
    return (
        load_denoiser(ASSETS / "mini", dtype=torch.float64),
        load_tokenizer(ASSETS / "mini"),
        load("countdown"),
    )


def request(mini: tuple, examples: list, settings: DecodeConfig, **more: Any) -> EvalRequest:
    denoiser, tokenizer, task = mini
    given = {"denoiser": denoiser, "tokenizer": tokenizer, "task": task, **more}
    return EvalRequest(examples=examples, settings=settings, **given)


def test_batches_change_nothing(mini: tuple) -> None:
    """Alone, in batches by length, or all in the order of the problems: a row's draws are keyed by
    its number.
    """
    denoiser, tokenizer, task = mini
    longer = load("countdown", numbers=4).examples("test")[:2]
    examples = [longer[0], *task.examples("test")[:3], longer[1]]
    prompts = [encode_prompt(tokenizer, task.prompt(e)) for e in examples]
    assert len({len(p) for p in prompts}) > 1
    settings = DecodeConfig(gen_length=24, block_length=8, steps=12, select="entropy")
    options = {"temperature": 1.0, "samples": 2, "seed": 3}
    by_size = [
        evaluate(request(mini, examples, settings, batch_size=n, **options)) for n in (1, 3, 256)
    ]
    for other in by_size[1:]:
        assert [replace(i, seconds=0) for i in other.items] == [
            replace(i, seconds=0) for i in by_size[0].items
        ]
    generator = named_generator(3, "eval")
    in_order = decode_blank(
        LocalRollouts(denoiser),
        denoiser,
        [p for p in prompts for _ in range(2)],
        settings,
        temperature=1.0,
        row_ids=range(10),
        generator=generator,
    )
    items = by_size[0].items
    assert [item.text for item in items] == decode_texts(tokenizer, in_order.completions())
    assert [item.nfe for item in items] == in_order.nfe.tolist()
    assert [item.id for item in items] == [e.id for e in examples for _ in range(2)]
    assert [item.sample for item in items] == [0, 1] * 5 and items[0].text != items[1].text
    for item in items:
        assert item.parts["correct"] == item.correct and item.seed == 3
        assert item.prompt.startswith("numbers ")


@pytest.mark.parametrize("protocol", ["strict", "d1"])
def test_the_published_judges_see_the_end_of_turn(mini: tuple, protocol: str) -> None:
    """Under d1 the judged text holds the special tokens up to the first EOS; the kept text never
    does.
    """
    denoiser, tokenizer, task = mini
    ends = tokenizer.decode([denoiser.eos_id])
    published = load("countdown", protocol=protocol)
    seen: list[str] = []

    class Ended(BaseTask):
        """Right is a text with an end-of-turn token in it."""

        reads_special_tokens = published.reads_special_tokens
        prompt = staticmethod(task.prompt)

        def grade(self, example: Example, text: str) -> Grade:
            seen.append(text)
            return Grade(ends in text, {})

    settings = DecodeConfig(gen_length=24, block_length=8, steps=24)
    rollouts: list[Rollout] = []
    asked = request(
        mini, task.examples("test")[:3], settings, task=cast(Any, Ended()), batch_size=3
    )
    result = evaluate(asked, on_rollout=rollouts.append)
    ids = rollouts[0].completions()
    # Each text is judged once; under d1 there are two of each completion.
    assert len(seen) == len(set(seen)) == (6 if protocol == "d1" else 3)
    ended = [protocol == "d1" and row[-1] == denoiser.eos_id for row in ids]
    assert any(row[-1] == denoiser.eos_id for row in ids)
    assert sorted(item.correct for item in result.items) == sorted(ended)
    assert sorted(item.text for item in result.items) == sorted(decode_texts(tokenizer, ids))
    assert not any(ends in item.text for item in result.items)


def test_what_is_done_is_left_out_and_the_rest_stays_in_its_batches(mini: tuple) -> None:
    _, _, task = mini
    examples = task.examples("test")[:5]
    settings = DecodeConfig(gen_length=24, block_length=8, steps=12, select="entropy")
    whole = list(evaluated_rows(request(mini, examples, settings, batch_size=2)))
    first, second, third = (set(items) for _, items in whole)
    done = first | set(list(second)[:1])
    rest = list(evaluated_rows(request(mini, examples, settings, batch_size=2), done=done))
    assert [set(items) for _, items in rest] == [second, third]
    for (ours, _), (theirs, _) in zip(rest, whole[1:], strict=True):
        assert ours.ids.equal(theirs.ids) and ours.behavior_logps.equal(theirs.behavior_logps)


def test_only_what_is_random_may_be_repeated(mini: tuple) -> None:
    _, _, task = mini
    examples = task.examples("test")[:2]
    greedy = DecodeConfig(gen_length=24, block_length=8, steps=24, select="entropy")
    with pytest.raises(ValueError, match="2 samples at temperature 0"):
        evaluate(request(mini, examples, greedy, samples=2))
    shuffled = DecodeConfig(gen_length=24, block_length=24, steps=24, select="random")
    texts = [item.text for item in evaluate(request(mini, examples, shuffled, samples=4)).items]
    assert len(set(texts[:4])) > 1


def test_logged_decodings_are_those_of_the_first_problems(mini: tuple, tmp_path: Path) -> None:
    """Also where batches by length decode others first."""
    _, tokenizer, task = mini
    longer = load("countdown", numbers=4).examples("test")[:3]
    examples = [*longer, *task.examples("test")[:4]]
    settings = DecodeConfig(gen_length=24, block_length=8, steps=12, select="entropy")
    rollouts: list[Rollout] = []
    result = evaluate(request(mini, examples, settings, batch_size=4), rollouts.append)
    assert rollouts[0].row_ids.tolist() == [3, 4, 5, 6]
    run = SimpleNamespace(step=7, out=tmp_path, task=task, tokenizer=tokenizer, trackers=False)
    log_eval(cast(Any, run), "test", "base", result, rollouts, examples)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [e.id for e in examples[:4]]
    for row, example, item in zip(rows, examples, result.items, strict=False):
        assert row["prompt"] == " ".join(
            [
                "numbers",
                *map(str, example.fields["numbers"]),
                "target",
                str(example.fields["target"]),
            ]
        )
        assert row["completion"] == item.text
        assert (
            " ".join(row["pieces"][: item.num_tokens]).replace("<|endoftext|>", "").strip()
            == item.text
        )
