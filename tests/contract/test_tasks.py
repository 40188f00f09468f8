"""Every shipped task keeps the contract; the checker finds tasks that do not."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.offline_tasks import offline_task
from unmaskrl import tasks
from unmaskrl.tasks import AnswerTask, Example, Grade
from unmaskrl.testing import check_task

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("countdown", {}),
    ("countdown", {"numbers": 4, "prompt_style": "instruct"}),
    ("countdown", {"protocol": "d1"}),
    ("sudoku", {"steps": True}),
    ("sudoku", {"protocol": "d1", "few_shot": 2}),
    ("gsm8k", {}),
    ("math", {}),
    ("math", {"protocol": "d1"}),
    ("jsonl", {}),
    ("jsonl", {"verifier": "math"}),
    ("jsonl", {"reward": "tests.contract.test_tasks:equals_answer"}),
    *([("reasoning_gym", {})] if importlib.util.find_spec("reasoning_gym") else []),
]


def equals_answer(completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: str(x))
def test_shipped_tasks(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    check_task(lambda: offline_task(name, tmp_path, **settings), size=4)


def test_every_shipped_task_is_here() -> None:
    missing = set() if importlib.util.find_spec("reasoning_gym") else {"reasoning_gym"}
    assert {name for name, _ in SETTINGS} | missing == set(tasks.TASKS)


class Doubles(AnswerTask[int]):
    """Twice a number. Right in every respect; the tests below break one thing each."""

    name = "doubles"
    first: ClassVar[dict[str, int]] = {"train": 0, "validation": 10, "test": 20}

    def examples(self, split: str) -> list[Example]:
        if split not in self.first:
            raise ValueError(f"split {split!r} is not one of train, validation, test")
        start = self.first[split]
        return [Example(id=f"d{n}", fields={"n": n}) for n in range(start, start + 10)]

    def prompt(self, example: Example) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"twice {example.fields['n']}"}]

    def reference(self, example: Example) -> str | None:
        return f"<answer> {2 * example.fields['n']} </answer>"

    def read(self, example: Example, body: str) -> int | None:
        body = body.strip()
        return int(body) if body.isascii() and body.isdigit() and len(body) < 20 else None

    def solves(self, example: Example, answer: int) -> bool:
        return answer == 2 * example.fields["n"]


def changed(name: str, method: Callable[..., Any]) -> type[Doubles]:
    return type("Changed", (Doubles,), {name: method})


def test_a_right_task_passes_as_object_and_as_factory() -> None:
    check_task(Doubles)
    check_task(Doubles())


def overlapping(self: Doubles, split: str) -> list[Example]:
    return Doubles.examples(self, "train" if split == "test" else split)


def any_split(self: Doubles, split: str) -> list[Example]:
    return Doubles.examples(self, split if split in self.first else "test")


def drawn(self: Doubles, split: str) -> list[Example]:
    return random.SystemRandom().sample(Doubles.examples(self, split), 10)


def same_ids(self: Doubles, split: str) -> list[Example]:
    return [Example(id="d", fields=example.fields) for example in Doubles.examples(self, split)]


def kept_list(self: Doubles, split: str) -> list[Example]:
    cache = self.__dict__.setdefault("cache", {})
    return cache.setdefault(split, Doubles.examples(self, split))


def global_generator(self: Doubles, example: Example) -> list[dict[str, str]]:
    random.random()
    return Doubles.prompt(self, example)


def not_finite(self: Doubles, example: Example, text: str) -> Grade:
    grade = Doubles.grade(self, example, text)
    return Grade(grade.correct, {**grade.parts, "length": float("inf") if not text else 0.0})


def counting(self: Doubles, example: Example, text: str) -> Grade:
    example.fields["seen"] = True
    return Doubles.grade(self, example, text)


def slow(self: Doubles, example: Example, text: str) -> Grade:
    time.sleep(0.02 if len(text) > 1000 else 0)
    return Doubles.grade(self, example, text)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("examples", overlapping, "splits train and test share 10 problems"),
        ("examples", any_split, r"examples\('no such split'\) raises no ValueError"),
        ("examples", drawn, r"examples\('train'\) are others when they are made again"),
        ("examples", same_ids, "two problems of split train have the same id"),
        ("examples", kept_list, "changing the list that examples gave"),
        ("examples", lambda self, split: [], "there is no example in any split"),
        ("columns", property(lambda self: ("n", "m")), r"d0 lacks the columns \['m'\]"),
        ("prompt", lambda self, e: "twice", "the prompt of d0 is no list of"),
        ("prompt", global_generator, "draws from Python's global generator"),
        ("reference", lambda self, e: "<answer> 1 </answer>", "d0 is graded wrong: '<answer> 1"),
        ("solves", lambda self, e, a: True, "of 9 other problems are all graded right"),
        ("read", lambda self, e, body: int(body), "grade raised ValueError: invalid literal"),
        ("grade", lambda self, e, text: True, "grade returned bool, not a Grade"),
        ("grade", lambda self, e, text: Grade(True, {}), "earns no more than an empty text"),
        ("grade", not_finite, "part 'length' is inf on the text '', not a finite number"),
        ("grade", counting, "grading changed the fields of d0"),
        ("grade", slow, r"grading .* took 0\.\d s"),
        ("answer_spans", lambda self, text: [(0, len(text) + 1)], r"answer_spans gives \(0, "),
    ],
)
def test_what_breaks_the_contract_is_found(
    name: str, method: Callable[..., Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_task(changed(name, method), seconds=0.015 if method is slow else 5.0)


def test_an_object_that_is_no_task_is_told_what_it_lacks() -> None:
    with pytest.raises(AssertionError, match="returned a int without name, columns"):
        check_task(lambda: 3)  # type: ignore[arg-type, return-value]
