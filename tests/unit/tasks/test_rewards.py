"""TRL's contract for reward functions: what they are given, what they may return, and what happens
to those that misbehave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests import rewards_d1_style as d1
from tests import rewards_trl_style as trl
from unmaskrl import tasks
from unmaskrl.tasks import (
    BaseTask,
    CallContext,
    Example,
    Grade,
    TrainerState,
    completion_text,
    grade,
    trl_reward_parts,
)

ROWS = [
    Example(id=str(n), fields={"numbers": [3, 7, 12], "target": 33, "answer": "33"})
    for n in range(3)
]
TEXTS = ["<answer>33</answer>", "<answer>3*7+12</answer>", "none"]


def parts_of(*functions: Any, **options: Any) -> list[list[float | None]]:
    named = {str(n): function for n, function in enumerate(functions)}
    context = CallContext(completion_ids=[[1, 2], [3], []], run_name="run", **options)
    grades = grade(tasks.load("countdown"), ROWS, TEXTS, context, named)
    return [grades.parts[name] for name in named]


def test_files_of_d1s_style_run_unchanged() -> None:
    found = parts_of(d1.right_number, d1.digits_only, d1.shorter_is_better, d1.reaches_target)
    assert found == [[2.0, 0.0, 0.0], [0.5, 0.0, 0.0], [-19.0, -23.0, -4.0], [0.1, 1.0, 0.0]]


def test_files_of_trls_style_run_unchanged() -> None:
    found = parts_of(
        trl.by_tokens, trl.opens_with_tag, trl.as_array, trl.as_tensor, trl.as_iterator, trl.counted
    )
    assert found == [[2, 1, 0], [1, 1, 0], [0, 1, 2], [0, 0.5, 1], [0, 1, 2], [1, 1, 1]]
    assert all(isinstance(score, float) for part in found for score in part)


def test_rows_of_texts_come_with_texts() -> None:
    rows = [Example(id="0", fields={"prompt": "2 + 2?", "ground_truth": "4", "level": 0})]
    task = tasks.load("jsonl", data="x.jsonl", reward="tests.rewards_trl_style:equals_reference")
    functions = {"characters": trl.by_characters}
    grades = grade(task, rows, ["4"], CallContext(), functions)
    assert list(grades.parts.values()) == [[1.0], [1.0]] and grades.correct == [True]


def test_numbers_of_every_kind_count_as_floats() -> None:
    parts = trl_reward_parts([trl.as_scalars], ["?"] * 7, ["a"] * 7, {})
    assert parts == {"as_scalars": [0.5, 1.0, 0.25, 1.0, 3.0, 2.0, 1.5]}


def test_none_abstains_and_rows_without_any_reward_count_as_zero() -> None:
    rows = [Example(id=str(n), fields={"prompt": "?", "level": n}) for n in range(3)]
    names = ["tests.rewards_trl_style:only_even_rows", "tests.rewards_trl_style:only_odd_rows"]
    both = grade(tasks.load("jsonl", data="x.jsonl", reward=names), rows, ["a"] * 3)
    assert list(both.parts.values()) == [[1.0, None, 1.0], [None, -1.0, None]]
    assert both.totals() == [1.0, -1.0, 1.0] and both.unscored() == 0.0
    assert both.correct == [True, False, True]
    even = grade(tasks.load("jsonl", data="x.jsonl", reward=names[:1]), rows, ["a"] * 3)
    assert even.totals() == [1.0, 0.0, 1.0] and even.unscored() == pytest.approx(1 / 3)


def test_the_state_of_the_run_and_what_is_logged() -> None:
    context = CallContext(trainer_state=TrainerState(global_step=3, max_steps=4))
    parts = trl_reward_parts([trl.by_progress], ["?"] * 2, ["a"] * 2, {}, context)
    assert parts == {"by_progress": [0.75, 0.75]}
    assert context.metrics == {"share": [0.75]} and context.extra == {"share": [0.75, 0.75]}
    # in evaluation a run counts as over
    assert trl_reward_parts([trl.by_progress], ["?"], ["a"], {}) == {"by_progress": [1.0]}


def test_async_functions_wait_together_on_one_loop() -> None:
    here: set[str] = set()

    async def meets(other: str, me: str) -> list[float]:
        here.add(me)
        for _ in range(1000):
            if other in here:
                return [1.0]
            await asyncio.sleep(0.01)
        return [0.0]  # the other one was not begun

    async def left(**_: Any) -> list[float]:
        return await meets("right", "left")

    async def right(**_: Any) -> list[float]:
        return await meets("left", "right")

    assert trl_reward_parts([left, right], ["?"], ["a"], {}) == {"left": [1.0], "right": [1.0]}
    trl.LOOPS.clear()
    for _ in range(2):
        trl.EVENTS.clear()
        assert trl_reward_parts([trl.slow_one, trl.slow_two], ["?"], ["a"], {}) == {
            "slow_one": [1.0],
            "slow_two": [0.0],
        }
        assert trl.EVENTS == ["begins", "begins", "ends", "ends"]
    assert len(set(trl.LOOPS)) == 1, (
        "clients of servers belong to the loop that they were first used on"
    )

    async def inside() -> dict[str, list[float | None]]:  # as in a notebook, whose loop is running
        return trl_reward_parts([trl.slow_two], ["?"], ["a"], {})

    assert asyncio.run(inside()) == {"slow_two": [0.0]}


async def fails(**_: Any) -> list[float]:
    await asyncio.sleep(0)
    raise KeyError("gold")


async def exits(**_: Any) -> list[float]:
    task = asyncio.ensure_future(leaves())  # from a sub-task it would end the loop
    await task
    return [1.0]


async def leaves() -> None:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("function", "words"), [(fails, "KeyError: 'gold'"), (exits, "SystemExit: 0")]
)
def test_async_functions_that_raise_are_named(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(
        ValueError, match=rf"reward '{function.__name__}' raised .*test_rewards.py:\d+: {words}"
    ):
        trl_reward_parts([trl.slow_two, function], ["?"], ["a"], {})
    assert trl_reward_parts([trl.slow_two], ["?"], ["a"], {}) == {"slow_two": [0.0]}


def test_a_sync_error_leaves_no_async_function_waiting() -> None:
    def broken(**_: Any) -> list[float]:
        raise TypeError("no")

    with pytest.raises(ValueError, match="'broken' raised"):
        trl_reward_parts([trl.slow_one, broken], ["?"], ["a"], {})


def test_functions_get_what_they_name_and_lack_is_named() -> None:
    def few(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    def needs_gold(completions: list[str], gold: list[str]) -> list[float]:
        return [1.0]

    assert trl_reward_parts([few], ["?"], ["a"], {"answer": ["b"]}) == {"few": [1.0]}
    with pytest.raises(ValueError, match="missing 1 required positional argument: 'gold'") as info:
        trl_reward_parts([needs_gold], ["?"], ["a"], {"answer": ["b"]})
    assert "\n" not in str(info.value)


def test_a_column_named_step_is_the_users() -> None:
    def steps(step: list[int], **_: Any) -> list[float]:
        return [float(n) for n in step]

    assert trl_reward_parts([steps], ["?"], ["a"], {"step": [7]}) == {"steps": [7.0]}


def test_what_a_function_changes_in_place_stays_its_own() -> None:
    def changes(
        prompts: list[Any], completions: list[Any], numbers: list[list[int]], **_: Any
    ) -> list[float]:
        prompts.clear()
        for completion in completions:
            completion.clear()
        numbers[0].sort(reverse=True)
        return [0.0] * 3

    assert parts_of(changes, d1.reaches_target)[1] == [0.1, 1.0, 0.0]
    assert ROWS[0].fields["numbers"] == [3, 7, 12]


def test_the_text_of_a_completion() -> None:
    assert completion_text("a") == completion_text([{"role": "assistant", "content": "a"}]) == "a"


class Lengths(BaseTask):
    """Right are texts of three characters; odd ones get no second part."""

    name = "lengths"

    def __init__(self, made: Callable[[str], Any]) -> None:
        self.made = made
        self.seen: list[str] = []

    def grade(self, example: Example, text: str) -> Grade:
        self.seen.append(text)
        return self.made(text)


def test_a_text_is_graded_once_and_a_missing_part_abstains() -> None:
    def of_length(text: str) -> Grade:
        even = {"even": 0.5} if len(text) % 2 == 0 else {}
        return Grade(len(text) == 3, {"length": len(text), **even})

    task: Any = Lengths(of_length)
    texts = ["aaa", "bb", "bb", ""]
    grades = grade(task, [ROWS[0]] * 4, texts)
    assert task.seen == texts
    assert grades.parts == {"length": [3.0, 2.0, 2.0, 0.0], "even": [None, 0.5, 0.5, 0.5]}
    assert grades.correct == [True, False, False, False]
    assert grades.totals() == [3.0, 2.5, 2.5, 0.5]
    assert task.correct(ROWS[0], "aaa") is True


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda text: int(text), r"task lengths: grade raised .*test_rewards.py:\d+: ValueError: "),
        (lambda text: (True, {}), "task lengths: grade returned tuple, expected unmaskrl.tasks"),
        (lambda text: Grade(True, {"a": float("nan")}), "reward 'a' returned nan for row 0"),
        (lambda text: Grade(True, {"a": "1"}), "reward 'a' returned '1' for row 0"),  # type: ignore
    ],
)
def test_what_is_no_grade_is_told_in_one_line(made: Callable[[str], Any], message: str) -> None:
    task: Any = Lengths(made)
    with pytest.raises(ValueError, match=message) as info:
        grade(task, ROWS[:1], ["a\nb"])
    assert "\n" not in str(info.value)
