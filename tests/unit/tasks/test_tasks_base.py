"""Loading tasks, answer tags, and TRL's reward contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch

from tests.offline_tasks import offline_task
from unmaskrl import tasks
from unmaskrl.tasks import Example, as_trl_reward, call_trl_rewards, trl_reward_parts
from unmaskrl.tasks.base import answer_spans, last_answer, only_answer, stable_hash


def test_load_passes_settings_on() -> None:
    task = tasks.load("countdown", numbers=4, eval_size=7)
    assert task.name == "countdown"
    assert len(task.examples("test")) == 7
    assert len(task.examples("test")[0].fields["numbers"]) == 4


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_every_task_keeps_the_protocol(name: str, tmp_path: Path) -> None:
    task = offline_task(name, tmp_path)
    example = task.examples("validation")[0]
    assert task.name == name
    assert set(task.columns) <= set(example.fields)
    assert [message["role"] for message in task.prompt(example)] == ["user"]
    reference = task.reference(example)
    assert reference is not None
    grade = task.grade(example, reference)
    assert grade.correct is True
    first = "score" if name == "reasoning_gym" else "correct"
    assert grade.parts == {first: 1.0, "format": 0.1}
    # its worked solution boxes the answer too
    assert len(task.answer_spans(reference)) == (2 if name == "math" else 1)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("sudoko", {}, "unknown task 'sudoko': did you mean 'sudoku'"),
        (
            "chess",
            {},
            "unknown task 'chess': expected one of countdown, sudoku, gsm8k, math, reasoning_gym, "
            "jsonl",
        ),
        (
            "countdown",
            {"number": 3},
            "task 'countdown' has no setting 'number': did you mean 'numbers'",
        ),
        ("sudoku", {"numbers": 3}, "task 'sudoku' has no setting 'numbers'"),
        ("countdown", {"numbers": 5}, "numbers is 5, expected an integer in 3..4"),
        ("countdown", {"numbers": "3"}, "numbers is '3', expected an integer"),
        ("countdown", {"train_size": 0}, "train_size is 0, expected an integer of at least 1"),
        ("countdown", {"seed": True}, "seed is True, expected an integer"),
        ("countdown", {"prompt_style": "instruction"}, "did you mean 'instruct'"),
        ("countdown", {"max_number": 1}, "max_number is 1"),
        ("countdown", {"max_target": 101}, "max_target is 101"),
        ("sudoku", {"max_blanks": 13}, "max_blanks is 13, expected an integer in 1..12"),
        (
            "sudoku",
            {"min_blanks": 9, "max_blanks": 8},
            "min_blanks is 9, expected an integer in 1..8",
        ),
    ],
)
def test_bad_settings_are_refused(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.load(name, **kwargs)


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_unknown_split_names_the_nearest(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"split 'valid' is not one of .* did you mean 'validation'"
    ):
        offline_task(name, tmp_path).examples("valid")


@pytest.mark.parametrize(
    ("text", "last", "only", "spans"),
    [
        ("<answer>a</answer>", "a", "a", ["a"]),
        ("x <answer> a </answer> y", " a ", " a ", [" a "]),
        ("<answer></answer>", "", "", [""]),
        ("<answer>a</answer><answer>b</answer>", "b", None, ["a", "b"]),
        ("<answer>a</answer><answer>b", "a", None, ["a"]),
        ("<answer>a<answer>b</answer>", "b", None, ["a<answer>b"]),
        ("</answer><answer>", None, None, []),
        ("<answer>", None, None, []),
        ("", None, None, []),
    ],
)
def test_answer_tags(text: str, last: str | None, only: str | None, spans: list[str]) -> None:
    assert last_answer(text) == last
    assert only_answer(text) == only
    assert [text[start:end] for start, end in answer_spans(text)] == spans


def test_stable_hash_is_pinned() -> None:
    """Splits rest on this number: changing it would leak test problems into training sets made
    earlier.
    """
    # printf 'sudoku/1234341221434321' | b2sum -l 64
    assert stable_hash("sudoku/1234341221434321") == 0xEA0EE16F686DAF21


def columns_of(examples: list[Example]) -> dict[str, list[object]]:
    return {key: [example.fields[key] for example in examples] for key in examples[0].fields}


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_trl_rewards_equal_the_parts(name: str, tmp_path: Path) -> None:
    task = offline_task(name, tmp_path)
    examples = task.examples("train")
    wrong = "<answer> \\boxed{0} </answer>" if name == "math" else "<answer> 0 </answer>"
    completions = [
        task.reference(e)
        if row % 2 == 0
        else task.lazy(e)
        if isinstance(task, tasks.LazyTask)
        else wrong
        for row, e in enumerate(examples)
    ]
    prompts = [task.prompt(example) for example in examples]
    names = list(task.grade(examples[0], "").parts)
    functions = [as_trl_reward(task, part) for part in names]
    totals = call_trl_rewards(functions, prompts, completions, columns_of(examples))
    assert totals == pytest.approx([0.1 if row % 2 else 1.1 for row in range(len(examples))])
    parts = trl_reward_parts(functions, prompts, completions, columns_of(examples))
    assert list(parts) == [f"{name}_{part}" for part in names]
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert call_trl_rewards(functions, prompts, chats, columns_of(examples)) == totals


def test_trl_reward_ignores_what_is_no_column_and_names_what_is_missing() -> None:
    task = tasks.load("countdown")
    reward = as_trl_reward(task, "correct")
    texts = ["<answer>3*7+12</answer>"]
    assert reward(
        prompts=[""], completions=texts, numbers=[[3, 7, 12]], target=[33], trainer_state=None
    ) == [1.0]
    with pytest.raises(ValueError, match="no column 'target' with 1 rows"):
        reward(prompts=[""], completions=texts, numbers=[[3, 7, 12]], target=[33, 33])
    with pytest.raises(ValueError, match="has no reward 'corect': did you mean 'correct'"):
        as_trl_reward(task, "corect")([""], texts, numbers=[[3, 7, 12]], target=[33])


def returning(value: object) -> Callable[..., object]:
    def odd(prompts: object, completions: object, **columns: object) -> object:
        return value

    return odd


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'odd' returned NoneType"),
        (1.0, "'odd' returned float"),
        ([1.0], "'odd' returned 1 values, expected one for each of 2"),
        ([1.0, math.nan], "'odd' returned nan for row 1"),
        ([math.inf, 0.0], "'odd' returned inf for row 0"),
        (["1", 0.0], "'odd' returned '1' for row 0"),
        ([[1.0], 0.0], r"'odd' returned \[1.0\] for row 0"),
        ({0: 1.0, 1: 2.0}, "'odd' returned dict"),
        ("ab", "'odd' returned str"),
        ([10**308 * 10, 0.0], r"'odd' returned 1000.*\(310 characters\) for row 0"),
        ([0.0, -(10**5000)], "'odd' returned a int that is too long to write for row 1"),
        ([Fraction(10**400, 3), 0.0], "'odd' returned Fraction.* for row 0"),
        (
            [1e39, 0.0],
            r"'odd' returned 1e\+39 for row 0, expected a finite float of at most 3.4e\+38",
        ),
        ([0.0, numpy.float64(-1e308)], "'odd' returned .*1e.308.* for row 1"),
        (torch.tensor([0.0, math.nan]), "'odd' returned nan for row 1"),
    ],
)
def test_bad_trl_rewards_are_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_trl_rewards([returning(value)], ["p", "p"], ["a", "b"], {})


def test_trl_rewards_are_summed_and_names_are_unique() -> None:
    def length(
        prompts: list[str], completions: list[str], bonus: list[int], **_: object
    ) -> list[float]:
        return [len(text) + extra for text, extra in zip(completions, bonus, strict=True)]

    functions = [length, returning([1, True])]
    assert call_trl_rewards(functions, ["p", "p"], ["a", "bb"], {"bonus": [10, 20]}) == [12.0, 23.0]
    assert call_trl_rewards([], ["p"], ["a"], {}) == [0.0]
    with pytest.raises(ValueError, match="two reward functions are named 'length'"):
        call_trl_rewards([length, length], ["p"], ["a"], {"bonus": [0]})
