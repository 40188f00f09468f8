"""The countdown problems that we generate: templates first, then numbers that fit them, balanced
and split by numbers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, product
from math import factorial

from unmaskrl.tasks.base import Example, stable_hash
from unmaskrl.tasks.puzzles import arithmetic
from unmaskrl.tasks.puzzles.arithmetic import Step, Tree

# Results of worked steps stay within the small model's vocabulary.
STEP_LIMIT = 100
# No fixed template may solve more than this share of a split.
TEMPLATE_CAP = 0.045
_TRIES = 48
_PATIENCE = 12


def split_of(numbers: Iterable[int]) -> str:
    """The split of a multiset of numbers, for every seed the same: 80 / 10 / 10 %."""
    bucket = stable_hash(f"countdown/{sorted(numbers)}") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def kind_of(numbers: Sequence[int], target: int) -> str:
    """ "addsub" if some solution uses only + and -, else "muldiv"."""
    # A positive target leaves at least one plus, so no choice of signs needs a unary minus.
    sums = (sum(signed) for signed in product(*((number, -number) for number in numbers)))
    return "addsub" if target in sums else "muldiv"


Numbers = tuple[int, ...]
Settings = tuple[str, int, int, int, int, int]


class _Generator:
    """Draws templates, then numbers that fit them, until a split is full or every template is used
    up.
    """

    def __init__(
        self, split: str, seed: int, size: int, count: int, max_number: int, max_target: int
    ) -> None:
        self.split = split
        self.size = size
        self.count = count
        self.max_target = max_target
        self.rng = random.Random(f"countdown/{split}/{seed}")
        self.max_number = max_number
        self.cap = _cap(size)
        self.found: dict[tuple[Numbers, int], Tree] = {}
        self.orders: Counter[tuple[Numbers, int]] = Counter()
        self.solved: Counter[int] = Counter()

    def run(self) -> list[Example]:
        """First one prompt order per problem; only if those run out, further orders of the same
        problems.
        """
        for orders in (1, factorial(self.count)):
            self._fill(orders)
        examples = [
            _example(numbers, target, tree) for (numbers, target), tree in self.found.items()
        ]
        # Late draws lack the templates that reached the cap.
        self.rng.shuffle(examples)
        return examples

    def balanced_size(self) -> int:
        """About the largest size whose cap on every template leaves as many problems among those
        found.
        """
        size = len(self.found)
        # Shrinks geometrically; the bound only guards against a cycle.
        for _ in range(100):
            previous = size
            size = self._count_under(_cap(size))
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
        code = int(self.rng.random() * self.max_number**self.count)
        base = self.max_number
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
    """Target -> the watched templates (by number) that reach it from these numbers in this
    order.
    """
    found: dict[int, list[int]] = {}
    for index, tree in enumerate(_watched(len(numbers))):
        numerator, denominator = arithmetic.ratio(tree, numbers)
        if denominator and numerator % denominator == 0:
            found.setdefault(numerator // denominator, []).append(index)
    return found


@lru_cache(maxsize=2)
def _watched(count: int) -> tuple[Tree, ...]:
    """The templates that could exceed the cap: all 68 of three numbers; of four only those of + and
    -.
    """
    return tuple(tree for tree in arithmetic.templates(count) if count == 3 or _weight(tree) == 3)


@lru_cache(maxsize=2048)
def _weight(tree: Tree) -> int:
    """How often a template is drawn: 3 for + and - alone, 2 with *, 1 with / (whose problems are
    few).
    """
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
def generate(settings: Settings) -> tuple[Example, ...]:
    generator = _Generator(*settings)
    examples = generator.run()
    split, _, size, count, max_number, max_target = settings
    if len(examples) < size:
        raise ValueError(
            f"countdown has only about {generator.balanced_size()} balanced {split} problems for "
            f"numbers={count}, max_number={max_number}, max_target={max_target}, got a size of "
            f"{size}: "
            "lower it or raise a limit"
        )
    return tuple(examples)
