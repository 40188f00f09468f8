"""Countdown: reach a target with + - * / and parentheses, using each given number exactly once.

The generator is ours, since reasoning-gym's gives no control of three things that decide whether a
gain means competence: splits disjoint by the numbers, a balance of solution templates (here no
fixed template such as n3+n2-n1 solves more than about 5% of a split; with numbers drawn first it is
17-20%), and leaving out what the lazy policy solves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from unmaskrl.tasks.base import (
    AnswerJudge,
    Example,
    Grade,
    check_range,
    file_stamp,
    read_examples,
)
from unmaskrl.tasks.d1 import d1_puzzles
from unmaskrl.tasks.math.answers import final_answer
from unmaskrl.tasks.math.latex_numbers import exact_value
from unmaskrl.tasks.math.wrapping import plain_arithmetic
from unmaskrl.tasks.protocols import GeneratedTask, PublishedRules, RuledTask, StrictRules
from unmaskrl.tasks.puzzles import arithmetic
from unmaskrl.tasks.puzzles.arithmetic import Expression, Tree
from unmaskrl.tasks.puzzles.countdown_problems import STEP_LIMIT, generate, kind_of

# A row of a file may need more; tried second.
FILE_STEP_LIMIT = 1_000_000
# Only guards against a tree that is no solution: the lazy sum of the largest numbers of a file
# fits.
WRITE_LIMIT = 10_000_000
_INSTRUCT = (
    "You are given the numbers {numbers} and the target {target}. Combine the numbers with +, -, * "
    "and / "
    "(parentheses are allowed) so that the result is exactly {target}. Use every number exactly "
    "once and no "
    "other number. First show your work, one operation at a time, each written like `2 * 5 = 10 "
    ";`. Then "
    "write one expression that reaches the target inside <answer></answer>, for example "
    "<answer> ( 2 * 5 ) - 1 </answer>, without an equals sign."
)


def write(tree: Tree) -> str:
    """Worked steps and the answer:
    ``3 * 7 = 21 ; 21 + 12 = 33 ; <answer> ( 3 * 7 ) + 12 </answer>``.
    """
    steps = arithmetic.whole_steps(tree, WRITE_LIMIT)
    assert steps is not None, tree
    worked = " ".join(f"{left} {op} {right} = {result} ;" for left, op, right, result in steps)
    return f"{worked} <answer> {arithmetic.render(tree)} </answer>"


def _hits(tree: Tree, numbers: Sequence[int], target: int) -> bool:
    numerator, denominator = arithmetic.ratio(tree, numbers)
    return denominator != 0 and numerator == target * denominator


@dataclass(frozen=True)
class StrictCountdown(AnswerJudge[Expression], StrictRules):
    """Our rules: the exact value of the last answer is the target, each number used once."""

    prompt_style: str

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """One user message: ``numbers 3 7 12 target 24``, or an instruction for a general chat
        model.
        """
        numbers = example.fields["numbers"]
        target = example.fields["target"]
        if self.prompt_style == "short":
            content = " ".join(("numbers", *map(str, numbers), "target", str(target)))
        else:
            content = _INSTRUCT.format(numbers=", ".join(map(str, numbers)), target=target)
        return [{"role": "user", "content": content}]

    def reference(self, example: Example) -> str | None:
        """Worked steps and the answer; None if no solution with positive integer results exists."""
        return next(iter(right_completions(example, limit=1)), None)

    def read(self, example: Example, body: str) -> Expression | None:
        """The expression of an answer's body."""
        return _expression(body)

    def solves(self, example: Example, answer: Expression) -> bool:
        """Whether the value is the target and the numbers are the given ones."""
        return answer.value == example.fields["target"] and sorted(answer.numbers) == sorted(
            example.fields["numbers"]
        )


class PublishedCountdown(PublishedRules):
    """d1's rules: {"score": 0, 0.1 or 1} as in its training, the verdict of its evaluation."""

    def in_split(self, example: Example, split: str) -> Example:
        """The example with its split, which chooses the prompt."""
        return d1_puzzles.with_split(example, split)

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """The prompt of training, or the other one of evaluation (validation, test)."""
        trains = d1_puzzles.trains(example)
        return d1_puzzles.countdown_prompt(
            example.fields["numbers"], example.fields["target"], trains
        )

    def reference(self, example: Example) -> str | None:
        """The equation, then the answer: evaluation grades the first ``expression = number``."""
        solution = example.fields["solution"]
        return solution and d1_puzzles.layout(f"{solution} = {example.fields['target']}", solution)

    def grade(self, example: Example, text: str) -> Grade:
        """The reward of training and the verdict of evaluation."""
        problem = (example.fields["numbers"], example.fields["target"])
        score = d1_puzzles.countdown_score(text, *problem)
        return Grade(d1_puzzles.countdown_correct(text, *problem), {"score": score})


def right_completions(example: Example, limit: int) -> list[str]:
    """Up to ``limit`` right completions, different beyond swapped operands, the known solution
    first.
    """
    if example.fields["solution"] is None:
        return []
    first = arithmetic.parse_tree(example.fields["solution"])
    assert first is not None, example
    others = _solutions(example.fields["numbers"], example.fields["target"])
    trees: dict[str, Tree] = {}
    for tree in (first, *islice(others, 0 if limit == 1 else None)):
        trees.setdefault(arithmetic.canonical(tree), tree)
    return [write(tree) for tree in islice(trees.values(), limit)]


@dataclass(frozen=True, kw_only=True)
class Countdown(GeneratedTask, RuledTask[StrictCountdown | PublishedCountdown]):
    """Countdown problems with 3 or 4 ``numbers`` in 1..max_number and a target in 1..max_target.

    ``data`` (JSONL rows ``{"numbers": [..], "target": n}``, or with the columns of the published
    sets: see published_row) replaces the problems of every split; a solution is searched for (None:
    there is none with positive integer results). Generated problems are distinct, never solved by
    the lazy sum, and splits share no multiset of numbers. ``protocol``: "strict", or "d1" for the
    published prompts, reward and parser with their quirks (docs/tasks.md). Fields: numbers, target,
    solution (an expression or None), kind (see kind_of), under d1 split; a row's other columns are
    kept. Raises ValueError.
    """

    name = "countdown"

    data: str | None = None
    numbers: int = 3
    max_number: int = 20
    max_target: int = 50

    def __post_init__(self) -> None:
        GeneratedTask.__post_init__(self)
        check_range("numbers", self.numbers, 3, 4)
        check_range("max_number", self.max_number, 2, STEP_LIMIT)
        check_range("max_target", self.max_target, 1, STEP_LIMIT)
        RuledTask.__post_init__(self)

    def _protocols(self) -> dict[str, StrictCountdown | PublishedCountdown]:
        return {"strict": StrictCountdown(self.prompt_style), "d1": PublishedCountdown()}

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that ``grade`` reads."""
        return ("numbers", "target")

    def examples(self, split: str) -> list[Example]:
        """The problems of a split. Raises ValueError for a bad row of ``data`` or too large a
        size.
        """
        size = self.size_of(split)
        found = (
            generate((split, self.seed, size, self.numbers, self.max_number, self.max_target))
            if self.data is None
            else _from_file(*file_stamp(self.data))
        )
        return [self.rules.in_split(example, split) for example in found]

    def references(self, example: Example, limit: int = 8) -> list[str]:
        """Up to ``limit`` right completions, different beyond swapped operands, the reference
        first.
        """
        return right_completions(example, limit)

    def lazy(self, example: Example) -> str:
        """The running sum of the numbers in prompt order, in the same layout."""
        first, *rest = example.fields["numbers"]
        tree: Tree = first
        for number in rest:
            tree = ("+", tree, number)
        return write(tree)


def _expression(body: str) -> Expression | None:
    """The expression of an answer's body, its box opened and LaTeX's signs read; ``= value`` behind
    it must be true.
    """
    body = final_answer(body)
    if len(body) > arithmetic.MAX_CHARACTERS:
        return None
    left, equals, right = plain_arithmetic(body).partition("=")
    parsed = arithmetic.parse(left)
    if parsed is None or not equals:
        return parsed
    return (
        parsed if parsed.value is not None and exact_value(right.strip()) == parsed.value else None
    )


def _solutions(numbers: Sequence[int], target: int) -> Iterator[Tree]:
    """Solution trees within the small step limit, or, if there are none, within the large one."""
    small = arithmetic.solution_trees(numbers, target, STEP_LIMIT)
    first = next(small, None)
    if first is None:
        yield from arithmetic.solution_trees(numbers, target, FILE_STEP_LIMIT)
        return
    yield first
    yield from small


@lru_cache(maxsize=8)
def _from_file(path: str, _modified: int, _size: int) -> tuple[Example, ...]:
    return read_examples(path, _from_row)


def published_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with numbers and target, also from the columns of two published sets (those columns
    stay).

    Jiayi-Pan/Countdown-Tasks-3to4: nums, target. d1's countdown_cd3_test.jsonl: input
    ("30,100,93"), output ("23").
    """
    if "numbers" not in row and "nums" in row:
        return {**row, "numbers": row["nums"]}
    if "numbers" not in row and isinstance(row.get("input"), str) and "output" in row:
        parts = [_whole(part) for part in row["input"].split(",", 4)]
        return {**row, "numbers": parts, "target": _whole(row["output"])}
    return row


def _whole(text: object) -> object:
    """The integer of a short text of digits; anything else as it is."""
    return int(text) if isinstance(text, str) and re.fullmatch(r" *[0-9]{1,6} *", text) else text


def _from_row(where: str, row: dict[str, Any]) -> Example:
    row = published_row(row)
    numbers = row.get("numbers")
    target = row.get("target")
    if (
        not isinstance(numbers, list)
        or len(numbers) not in (3, 4)
        or not all(map(_is_number, numbers))
    ):
        got = ascii(numbers)[:60]
        raise ValueError(
            f"{where}: got numbers {got}, expected a list of 3 or 4 integers in 1..999999"
        )
    if target is None or not _is_number(target):
        raise ValueError(
            f"{where}: got target {ascii(target)[:60]}, expected an integer in 1..999999"
        )
    tree = next(_solutions(numbers, target), None)
    if tree is None and not any(
        _hits(other, numbers, target) for other in arithmetic.templates(len(numbers))
    ):
        raise ValueError(
            f"{where}: no expression of the numbers {numbers} is {target}: correct the row or "
            "leave it out"
        )
    solution = None if tree is None else arithmetic.render(tree)
    return Example(id=where, fields={**row, "solution": solution, "kind": kind_of(numbers, target)})


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 999_999
