"""``check_task``: what training and evaluation ask of a task."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable
from typing import Any

from ..tasks import Example, Grade, Task, checked_task
from ..tasks.base import SPLITS
from .require import require

_GIANT = 300_000
# Texts that no honest answer looks like. A judge reads them, and none of them is right.
HOSTILE = (
    "",
    " \n\t ",
    "\0" * 50,
    "\ud800 \u202e\u2067 \u0663\u0661\uff11 \U0001d7d9 \u2460",
    "<answer></answer>",
    "<answer>",
    "</answer><answer>",
    "<answer> {} </answer>",
    "<answer> 1/0 </answer>",
    "<answer> nan </answer> <answer> -inf </answer>",
    "<answer> 9**9**9**9 </answer>",
    "<answer> __import__('os').abort() </answer>",
    "\\boxed{\\frac{1}{0}}",
    "{0.__class__} %s %n ${x}",
    "<answer>" * 20_000,
    "</answer>" * 20_000,
    "<answer></answer>" * 20_000,
    "<answer>" + "(" * _GIANT + "</answer>",
    "<answer>" + "9" * _GIANT + "</answer>",
    "<answer>" + "\\frac{" * (_GIANT // 6) + "</answer>",
    "a" * _GIANT,
    " " * _GIANT,
    "\\boxed{" * (_GIANT // 7),
)


def check_task(task: Task | Callable[[], Task], *, size: int = 16, seconds: float = 5.0) -> None:
    """AssertionError unless examples, prompts, references and grades are what a run relies on.

    ``task``: a task, or a factory, which is called twice and has to give the same problems. The
    first ``size`` examples of every split are looked at; splits share no problem. A reference is
    graded right and earns more than an empty text. Empty, huge and hostile texts are graded wrong,
    within ``seconds`` each, and raise nothing; so are references of other problems. Grades repeat,
    and leave the example and Python's global generator alone.
    """
    state = random.getstate()
    made = hasattr(task, "examples") and not isinstance(task, type)
    factory = (lambda: task) if made else task
    first: Task = _made(factory)
    splits = {split: _examples(first, split) for split in SPLITS}
    _check_repeats(factory, splits)
    _check_splits(splits)
    for examples in splits.values():
        for example in examples[:size]:
            _check_prompt(first, example)
            _check_reference(first, example)
    _check_unknown_split(first)
    _check_strangers(first, next(filter(None, splits.values()))[:size])
    chosen = splits["test"] or splits["train"]
    _check_hostile(first, chosen[0], seconds)
    require(
        random.getstate() == state, "the task draws from Python's global generator: use its own"
    )


def _made(factory: Any) -> Task:
    try:
        return checked_task(factory(), getattr(factory, "__name__", "task"))
    except ValueError as error:
        raise AssertionError(str(error)) from None


def _examples(task: Task, split: str) -> list[Example]:
    examples = task.examples(split)
    require(isinstance(examples, list), f"examples({split!r}) is no list")
    for example in examples:
        require(
            isinstance(example, Example), f"examples({split!r}) holds a {type(example).__name__}"
        )
        missing = set(task.columns) - set(example.fields)
        require(not missing, f"{example.id} lacks the columns {sorted(missing)}")
    ids = [example.id for example in examples]
    require(len(set(ids)) == len(ids), f"two problems of split {split} have the same id")
    return examples


def _check_repeats(factory: Any, splits: dict[str, list[Example]]) -> None:
    again = _made(factory)
    for split, examples in splits.items():
        repeated = again.examples(split)
        require(repeated == examples, f"examples({split!r}) are others when they are made again")
        repeated.clear()
        require(
            again.examples(split) == examples,
            "changing the list that examples gave changes what it gives next: return a new list",
        )


def _check_splits(splits: dict[str, list[Example]]) -> None:
    require(any(splits.values()), "there is no example in any split")
    problems = {split: {_problem(e) for e in examples} for split, examples in splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = problems[one] & problems[other]
        require(not shared, f"splits {one} and {other} share {len(shared)} problems")


def _problem(example: Example) -> str:
    """The fields that make a problem what it is; published prompts also depend on the split."""
    fields = {key: value for key, value in example.fields.items() if key != "split"}
    return json.dumps(fields, sort_keys=True, default=str)


def _check_prompt(task: Task, example: Example) -> None:
    messages = task.prompt(example)
    fits = isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))
    require(fits, f"the prompt of {example.id} is no list of {{'role': text, 'content': text}}")
    require(messages == task.prompt(example), f"the prompt of {example.id} changes")


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _check_reference(task: Task, example: Example) -> None:
    text = task.reference(example)
    if text is None:
        return
    require(isinstance(text, str), f"the reference of {example.id} is no text")
    require(text == task.reference(example), f"the reference of {example.id} changes")
    before = copy.deepcopy(example)
    grade = _graded(task, example, text)
    require(grade.correct, f"the reference of {example.id} is graded wrong: {text[:200]!a}")
    empty = _graded(task, example, "")
    require(
        sum(grade.parts.values()) > sum(empty.parts.values()),
        f"the reference of {example.id} earns no more than an empty text",
    )
    require(grade == _graded(task, example, text), f"{example.id}: a second grade is another one")
    require(example == before, f"grading changed the fields of {example.id}")
    _check_spans(task, text)


def _graded(task: Task, example: Example, text: str) -> Grade:
    shown = f"{text[:60]!a}" + (f"... ({len(text)} characters)" if len(text) > 60 else "")
    try:
        grade = task.grade(example, text)
    except Exception as error:
        said = f"grade raised {type(error).__name__}: {error} on the text {shown}"
        raise AssertionError(said) from error
    require(isinstance(grade, Grade), f"grade returned {type(grade).__name__}, not a Grade")
    require(isinstance(grade.correct, bool), f"correct is {grade.correct!r}, not True or False")
    for name, part in grade.parts.items():
        fits = isinstance(part, int | float) and math.isfinite(part)
        require(fits, f"part {name!r} is {part!r} on the text {shown}, not a finite number")
    return grade


def _check_spans(task: Task, text: str) -> None:
    for start, end in task.answer_spans(text):
        require(
            0 <= start <= end <= len(text),
            f"answer_spans gives ({start}, {end}) in a text of {len(text)} characters",
        )


def _check_unknown_split(task: Task) -> None:
    try:
        task.examples("no such split")
    except ValueError:
        return
    raise AssertionError("examples('no such split') raises no ValueError")


def _check_strangers(task: Task, examples: list[Example]) -> None:
    """Not every problem's reference solves the first problem."""
    own = examples[0]
    others = {task.reference(example) for example in examples} - {None, task.reference(own)}
    if len(others) > 2:
        require(
            not all(_graded(task, own, text or "").correct for text in others),
            f"the references of {len(others)} other problems are all graded right for {own.id}",
        )


def _check_hostile(task: Task, example: Example, seconds: float) -> None:
    for text in HOSTILE:
        began = time.perf_counter()
        grade = _graded(task, example, text)
        took = time.perf_counter() - began
        shown = f"{text[:60]!a} ({len(text)} characters)"
        require(not grade.correct, f"the text {shown} is graded right")
        require(took <= seconds, f"grading {shown} took {took:.1f} s")
        _check_spans(task, text)
