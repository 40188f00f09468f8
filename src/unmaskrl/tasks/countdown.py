"""Countdown: reach a target with + - * / and parentheses, using each given number exactly once.

The generator is ours, since reasoning-gym's gives no control of three things that decide whether a gain means
competence: splits disjoint by the numbers, a balance of solution templates (here no fixed template such as
n3+n2-n1 solves more than about 5% of a split; with numbers drawn first it is 17-20%), and leaving out what
the lazy policy solves.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice, product
from math import factorial
from typing import Any

from unmaskrl.tasks import arithmetic
from unmaskrl.tasks.arithmetic import Step, Tree
from unmaskrl.tasks.base import (
    FORMAT_REWARD,
    PROMPT_STYLES,
    SPLITS,
    Example,
    RewardPart,
    answer_spans,
    check_choice,
    check_range,
    file_stamp,
    last_answer,
    only_answer,
    read_examples,
    stable_hash,
)

# Results of worked steps stay within the small model's vocabulary.
STEP_LIMIT = 100
# A row of a file may need more; tried second.
FILE_STEP_LIMIT = 1_000_000
# Only guards against a tree that is no solution: the lazy sum of the largest numbers of a file fits.
WRITE_LIMIT = 10_000_000
# No fixed template may solve more than this share of a split.
TEMPLATE_CAP = 0.045
_TRIES = 48
_PATIENCE = 12

_INSTRUCT = (
    "You are given the numbers {numbers} and the target {target}. Combine the numbers with +, -, * and / "
    "(parentheses are allowed) so that the result is exactly {target}. Use every number exactly once and no "
    "other number. First show your work, one operation at a time, each written like `2 * 5 = 10 ;`. Then "
    "write one expression that reaches the target inside <answer></answer>, for example "
    "<answer> ( 2 * 5 ) - 1 </answer>, without an equals sign."
)


def write(tree: Tree) -> str:
    """Worked steps and the answer: ``3 * 7 = 21 ; 21 + 12 = 33 ; <answer> ( 3 * 7 ) + 12 </answer>``."""
    steps = arithmetic.whole_steps(tree, WRITE_LIMIT)
    assert steps is not None, tree
    worked = " ".join(f"{left} {op} {right} = {result} ;" for left, op, right, result in steps)
    return f"{worked} <answer> {arithmetic.render(tree)} </answer>"


def split_of(numbers: Iterable[int]) -> str:
    """The split of a multiset of numbers, for every seed the same: 80 / 10 / 10 %."""
    bucket = stable_hash(f"countdown/{sorted(numbers)}") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def kind_of(numbers: Sequence[int], target: int) -> str:
    """ "addsub" if some solution uses only + and -, else "muldiv"."""
    # A positive target leaves at least one plus, so no choice of signs needs a unary minus.
    sums = (sum(signed) for signed in product(*((number, -number) for number in numbers)))
    return "addsub" if target in sums else "muldiv"


def template_coverage(examples: Sequence[Example]) -> list[tuple[str, float]]:
    """The share of examples that each fixed template (``( n2 + n3 ) - n1``) solves, best first.

    A policy that knew only this template would score its share. All examples have the same count of numbers.
    """
    count = len(examples[0].fields["numbers"])
    names = [f"n{index + 1}" for index in range(count)]
    problems = [(example.fields["numbers"], example.fields["target"]) for example in examples]
    shares = [
        (arithmetic.render(tree, names), sum(_hits(tree, *problem) for problem in problems) / len(problems))
        for tree in arithmetic.templates(count)
    ]
    return sorted(shares, key=lambda item: -item[1])


def _hits(tree: Tree, numbers: Sequence[int], target: int) -> bool:
    numerator, denominator = arithmetic.ratio(tree, numbers)
    return denominator != 0 and numerator == target * denominator


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """Countdown problems with 3 or 4 ``numbers`` in 1..max_number and a target in 1..max_target.

    ``data`` (JSONL rows ``{"numbers": [..], "target": n}``) replaces the problems of every split; a solution
    is searched for (None: there is none with positive integer results). Generated problems are distinct,
    never solved by the lazy sum, and splits share no multiset of numbers. Fields: numbers, target, solution
    (an expression or None), kind (see kind_of); a row's other columns are kept. Raises ValueError.
    """

    seed: int = 0
    data: str | None = None
    train_size: int = 4096
    eval_size: int = 512
    prompt_style: str = "short"
    numbers: int = 3
    max_number: int = 20
    max_target: int = 50

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("train_size", self.train_size, 1)
        check_range("eval_size", self.eval_size, 1)
        check_choice("prompt_style", self.prompt_style, PROMPT_STYLES)
        check_range("numbers", self.numbers, 3, 4)
        check_range("max_number", self.max_number, 2, STEP_LIMIT)
        check_range("max_target", self.max_target, 1, STEP_LIMIT)

    def examples(self, split: str) -> list[Example]:
        """The problems of a split. Raises ValueError for a bad row of ``data`` or too large a size."""
        check_choice("split", split, SPLITS)
        if self.data is not None:
            return list(_from_file(*file_stamp(self.data)))
        size = self.train_size if split == "train" else self.eval_size
        return list(_generate((split, self.seed, size, self.numbers, self.max_number, self.max_target)))

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """One user message: ``numbers 3 7 12 target 24``, or an instruction for a general chat model."""
        numbers, target = example.fields["numbers"], example.fields["target"]
        if self.prompt_style == "short":
            content = " ".join(("numbers", *map(str, numbers), "target", str(target)))
        else:
            content = _INSTRUCT.format(numbers=", ".join(map(str, numbers)), target=target)
        return [{"role": "user", "content": content}]

    def reference(self, example: Example) -> str | None:
        """Worked steps and the answer; None if no solution with positive integer results exists."""
        return next(iter(self.references(example, limit=1)), None)

    def references(self, example: Example, limit: int = 8) -> list[str]:
        """Up to ``limit`` right completions, different beyond swapped operands, the reference first."""
        if example.fields["solution"] is None:
            return []
        first = arithmetic.parse_tree(example.fields["solution"])
        assert first is not None, example
        others = _solutions(example.fields["numbers"], example.fields["target"])
        trees: dict[str, Tree] = {}
        for tree in (first, *islice(others, 0 if limit == 1 else None)):
            trees.setdefault(arithmetic.canonical(tree), tree)
        return [write(tree) for tree in islice(trees.values(), limit)]

    def lazy(self, example: Example) -> str:
        """The running sum of the numbers in prompt order, in the same layout."""
        first, *rest = example.fields["numbers"]
        tree: Tree = first
        for number in rest:
            tree = ("+", tree, number)
        return write(tree)

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags."""
        return answer_spans(text)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the last answer uses each number once and its exact value is the target."""
        body = last_answer(text)
        parsed = None if body is None else arithmetic.parse(body)
        if parsed is None or parsed.value != example.fields["target"]:
            return False
        return sorted(parsed.numbers) == sorted(example.fields["numbers"])

    @property
    def name(self) -> str:
        """The name that load knows."""
        return "countdown"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rewards read."""
        return ("numbers", "target")

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """{"correct": 1 if correct, "format": 0.1 if there is one answer block with an expression}."""
        return {"correct": self._correct_reward, "format": self._format_reward}

    def _correct_reward(self, example: Example, text: str) -> float:
        return float(self.correct(example, text))

    def _format_reward(self, example: Example, text: str) -> float:
        body = only_answer(text)
        return 0.0 if body is None or arithmetic.parse(body) is None else FORMAT_REWARD


def _solutions(numbers: Sequence[int], target: int) -> Iterator[Tree]:
    """Solution trees within the small step limit, or, if there are none, within the large one."""
    small = arithmetic.solution_trees(numbers, target, STEP_LIMIT)
    first = next(small, None)
    if first is None:
        yield from arithmetic.solution_trees(numbers, target, FILE_STEP_LIMIT)
        return
    yield first
    yield from small


Numbers = tuple[int, ...]
Settings = tuple[str, int, int, int, int, int]


class _Generator:
    """Draws templates, then numbers that fit them, until a split is full or every template is used up."""

    def __init__(self, split: str, seed: int, size: int, count: int, max_number: int, max_target: int) -> None:
        self.split, self.size, self.count, self.max_target = split, size, count, max_target
        self.rng = random.Random(f"countdown/{split}/{seed}")
        self.max_number = max_number
        self.cap = _cap(size)
        self.found: dict[tuple[Numbers, int], Tree] = {}
        self.orders: Counter[tuple[Numbers, int]] = Counter()
        self.solved: Counter[int] = Counter()

    def run(self) -> list[Example]:
        """First one prompt order per problem; only if those run out, further orders of the same problems."""
        for orders in (1, factorial(self.count)):
            self._fill(orders)
        examples = [_example(numbers, target, tree) for (numbers, target), tree in self.found.items()]
        # Late draws lack the templates that reached the cap.
        self.rng.shuffle(examples)
        return examples

    def balanced_size(self) -> int:
        """About the largest size whose cap on every template leaves as many problems among those found."""
        size = len(self.found)
        # Shrinks geometrically; the bound only guards against a cycle.
        for _ in range(100):
            previous, size = size, self._count_under(_cap(size))
            if size == previous:
                break
        return size

    def _count_under(self, cap: int) -> int:
        solved: Counter[int] = Counter()
        kept = 0
        for numbers, target in self.found:
            solvers = _solvers(numbers).get(target, [])
            if all(solved[index] < cap for index in solvers):
                solved.update(solvers)
                kept += 1
        return kept

    def _fill(self, orders: int) -> None:
        trees = list(arithmetic.templates(self.count))
        cumulative = list(accumulate(map(_weight, trees)))
        misses: Counter[Tree] = Counter()
        while trees and len(self.found) < self.size:
            tree = self.rng.choices(trees, cum_weights=cumulative)[0]
            misses[tree] = 0 if self._draw(tree, orders) else misses[tree] + 1
            if misses[tree] > _PATIENCE:
                trees.remove(tree)
                cumulative = list(accumulate(map(_weight, trees)))

    def _draw(self, tree: Tree, orders: int) -> bool:
        steps = arithmetic.program(tree, self.count)
        for _ in range(_TRIES):
            numbers = self._numbers()
            target = arithmetic.whole_value(steps, numbers, STEP_LIMIT)
            if 0 < target <= self.max_target and self._accept(numbers, target, tree, orders):
                return True
        return False

    def _numbers(self) -> Numbers:
        # One draw for all numbers: most draws fit no template, so this is the hot path.
        code, base = int(self.rng.random() * self.max_number**self.count), self.max_number
        numbers = []
        for _ in range(self.count):
            code, digit = divmod(code, base)
            numbers.append(digit + 1)
        return tuple(numbers)

    def _accept(self, numbers: Numbers, target: int, tree: Tree, orders: int) -> bool:
        problem = (tuple(sorted(numbers)), target)
        if target == sum(numbers) or _cached_split(problem[0]) != self.split:
            return False
        if (numbers, target) in self.found or self.orders[problem] >= orders:
            return False
        filled = arithmetic.fill(tree, numbers)
        if any(map(_is_idle, arithmetic.whole_steps(filled, STEP_LIMIT) or [])):
            return False
        solvers = _solvers(numbers).get(target, [])
        if any(self.solved[index] >= self.cap for index in solvers):
            return False
        self.solved.update(solvers)
        self.orders[problem] += 1
        self.found[numbers, target] = filled
        return True


_cached_split = lru_cache(maxsize=1 << 17)(split_of)


def _cap(size: int) -> int:
    return max(1, int(TEMPLATE_CAP * size))


@lru_cache(maxsize=1 << 13)
def _solvers(numbers: Numbers) -> dict[int, list[int]]:
    """Target -> the watched templates (by number) that reach it from these numbers in this order."""
    found: dict[int, list[int]] = {}
    for index, tree in enumerate(_watched(len(numbers))):
        numerator, denominator = arithmetic.ratio(tree, numbers)
        if denominator and numerator % denominator == 0:
            found.setdefault(numerator // denominator, []).append(index)
    return found


@lru_cache(maxsize=2)
def _watched(count: int) -> tuple[Tree, ...]:
    """The templates that could exceed the cap: all 68 of three numbers; of four only those of + and -."""
    return tuple(tree for tree in arithmetic.templates(count) if count == 3 or _weight(tree) == 3)


@lru_cache(maxsize=2048)
def _weight(tree: Tree) -> int:
    """How often a template is drawn: 3 for + and - alone, 2 with *, 1 with / (whose problems are few)."""
    ops = set(arithmetic.render(tree)) & set("*/")
    return 1 if "/" in ops else 2 if ops else 3


def _is_idle(step: Step) -> bool:
    left, op, right, _ = step
    return op in "*/" and (right == 1 or (op == "*" and left == 1))


def _example(numbers: Numbers, target: int, tree: Tree) -> Example:
    fields = {
        "numbers": list(numbers),
        "target": target,
        "solution": arithmetic.render(tree),
        "kind": kind_of(numbers, target),
    }
    return Example(id="-".join(map(str, ("countdown", *numbers, target))), fields=fields)


@lru_cache(maxsize=16)
def _generate(settings: Settings) -> tuple[Example, ...]:
    generator = _Generator(*settings)
    examples = generator.run()
    split, _, size, count, max_number, max_target = settings
    if len(examples) < size:
        raise ValueError(
            f"countdown has only about {generator.balanced_size()} balanced {split} problems for "
            f"numbers={count}, max_number={max_number}, max_target={max_target}, got a size of {size}: "
            "lower it or raise a limit"
        )
    return tuple(examples)


@lru_cache(maxsize=8)
def _from_file(path: str, _modified: int, _size: int) -> tuple[Example, ...]:
    return read_examples(path, _from_row)


def _from_row(where: str, row: dict[str, Any]) -> Example:
    numbers, target = row.get("numbers"), row.get("target")
    if not isinstance(numbers, list) or len(numbers) not in (3, 4) or not all(map(_is_number, numbers)):
        got = ascii(numbers)[:60]
        raise ValueError(f"{where}: got numbers {got}, expected a list of 3 or 4 integers in 1..999999")
    if target is None or not _is_number(target):
        raise ValueError(f"{where}: got target {ascii(target)[:60]}, expected an integer in 1..999999")
    tree = next(_solutions(numbers, target), None)
    solution = None if tree is None else arithmetic.render(tree)
    return Example(id=where, fields={**row, "solution": solution, "kind": kind_of(numbers, target)})


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 999_999
