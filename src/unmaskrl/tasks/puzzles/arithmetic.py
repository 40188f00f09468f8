"""Arithmetic without eval: a grammar for model-written text, and expression trees for our own data.

Grammar (blank, tab and line ends between tokens are free; nothing else is allowed):
    sum = product (("+" | "-") product)* ; product = atom (("*" | "/") atom)* ; atom = integer | "("
    sum ")"
Integers are ASCII digits without sign or leading zero; there is no unary minus, no power and no "=
33" tail. Values are exact rationals. Every limit is checked before work is done, so that no text
can be slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_CHARACTERS = 1024
MAX_TOKENS = 64
MAX_DIGITS = 6
MAX_DEPTH = 16

_TOKEN = re.compile(r"[ \t\r\n]*([0-9]+|[-+*/()])")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}

# A leaf is an index into a list of numbers (templates) or the number itself (solutions).
Tree = int | tuple[str, "Tree", "Tree"]
Step = tuple[int, str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """A parsed expression: its numbers from left to right and its value (None: it divides by
    zero).
    """

    numbers: tuple[int, ...]
    value: Fraction | None


def parse(text: str) -> Expression | None:
    """Read ``text`` as one expression of the grammar above; None if it is not one or exceeds a
    limit.
    """
    tokens = tokenize(text)
    if tokens is None:
        return None
    postfix = _to_postfix(tokens)
    if postfix is None:
        return None
    numbers = tuple(int(token) for token in tokens if token.isdecimal())
    return Expression(numbers=numbers, value=_postfix_value(postfix))


def tokenize(text: str) -> list[str] | None:
    """Split into integers, operators and parentheses; None at any other character or beyond a
    limit.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    tokens: list[str] = []
    text = text.rstrip(" \t\r\n")
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) == MAX_TOKENS or not _is_plain(match[1]):
            return None
        tokens.append(match[1])
        position = match.end()
    return tokens


def _is_plain(token: str) -> bool:
    return len(token) <= MAX_DIGITS and (token == "0" or token[0] != "0")


def _to_postfix(tokens: list[str]) -> list[str] | None:
    """Shunting-yard, left associative; None where the order of tokens breaks the grammar."""
    output: list[str] = []
    stack: list[str] = []
    depth = 0
    operand_next = True
    for token in tokens:
        if operand_next != (token == "(" or token.isdecimal()):
            return None
        if token == "(":
            depth += 1
            stack.append(token)
        elif token == ")":
            depth -= 1
            _pop_operators(stack, output, 1)
            if not stack or depth < 0:
                return None
            stack.pop()
        elif token.isdecimal():
            output.append(token)
            operand_next = False
        else:
            _pop_operators(stack, output, _PRECEDENCE[token])
            stack.append(token)
            operand_next = True
        if depth > MAX_DEPTH:
            return None
    if operand_next or depth:
        return None
    _pop_operators(stack, output, 1)
    return output


def _pop_operators(stack: list[str], output: list[str], precedence: int) -> None:
    while stack and _PRECEDENCE.get(stack[-1], 0) >= precedence:
        output.append(stack.pop())


def _postfix_value(postfix: list[str]) -> Fraction | None:
    stack: list[Fraction] = []
    for token in postfix:
        if token.isdecimal():
            stack.append(Fraction(int(token)))
            continue
        right = stack.pop()
        left = stack.pop()
        if token == "/" and right == 0:
            return None
        stack.append(_apply(token, left, right))
    return stack[0]


def _apply(op: str, left: Fraction, right: Fraction) -> Fraction:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    return left * right if op == "*" else left / right


def parse_tree(text: str) -> Tree | None:
    """Read ``text`` as parse does, but return its tree with the numbers as leaves."""
    tokens = tokenize(text)
    postfix = None if tokens is None else _to_postfix(tokens)
    if postfix is None:
        return None
    stack: list[Tree] = []
    for token in postfix:
        if token.isdecimal():
            stack.append(int(token))
        else:
            right = stack.pop()
            left = stack.pop()
            stack.append((token, left, right))
    return stack[0]


def canonical(tree: Tree) -> str:
    """The text of a tree with the operands of + and * sorted: equal for trees that differ by a
    swap.
    """
    if isinstance(tree, int):
        return str(tree)
    sides = [canonical(tree[1]), canonical(tree[2])]
    left, right = sorted(sides) if tree[0] in "+*" else sides
    return f"({left}{tree[0]}{right})"


def render(tree: Tree, leaves: Sequence[object] | None = None) -> str:
    """Write a tree with blanks between tokens and compound operands in parentheses:
    ``( 3 * 7 ) + 12``.
    """
    if isinstance(tree, int):
        return str(tree if leaves is None else leaves[tree])
    left, right = (
        render(side, leaves) if isinstance(side, int) else f"( {render(side, leaves)} )"
        for side in tree[1:]
    )
    return f"{left} {tree[0]} {right}"


def fill(tree: Tree, numbers: Sequence[int]) -> Tree:
    """Replace every leaf (an index) by the number at that index."""
    if isinstance(tree, int):
        return numbers[tree]
    return tree[0], fill(tree[1], numbers), fill(tree[2], numbers)


def whole_steps(tree: Tree, limit: int) -> list[Step] | None:
    """The worked steps (left, op, right, result) in post-order; None if a result is not in
    1..limit.
    """
    steps: list[Step] = []
    return steps if _work(tree, limit, steps) else None


def _work(tree: Tree, limit: int, steps: list[Step]) -> int:
    if isinstance(tree, int):
        return tree
    left = _work(tree[1], limit, steps)
    right = left and _work(tree[2], limit, steps)
    result = right and whole_result(tree[0], left, right)
    if not 0 < result <= limit:
        return 0
    steps.append((left, tree[0], right, result))
    return result


def whole_result(op: str, left: int, right: int) -> int:
    """left op right for positive integers; 0 if it is not a positive integer."""
    if op == "+":
        return left + right
    if op == "*":
        return left * right
    if op == "-":
        return max(left - right, 0)
    return left // right if left % right == 0 else 0


@lru_cache(maxsize=4096)
def program(template: Tree, count: int) -> tuple[tuple[str, int, int], ...]:
    """A template as steps (op, slot, slot): slots 0..count-1 are the leaves, each step fills the
    next one.
    """
    steps: list[tuple[str, int, int]] = []

    def emit(tree: Tree) -> int:
        if isinstance(tree, int):
            return tree
        steps.append((tree[0], emit(tree[1]), emit(tree[2])))
        return count + len(steps) - 1

    emit(template)
    return tuple(steps)


def whole_value(steps: Sequence[tuple[str, int, int]], numbers: Sequence[int], limit: int) -> int:
    """The value of a program at ``numbers``; 0 as soon as a result is not an integer in
    1..limit.
    """
    slots = [*numbers]
    for op, left, right in steps:
        result = whole_result(op, slots[left], slots[right])
        if not 0 < result <= limit:
            return 0
        slots.append(result)
    return slots[-1]


def solution_trees(numbers: Sequence[int], target: int, limit: int) -> Iterator[Tree]:
    """All ways to reach target using each number once with every result in 1..limit, up to
    swaps.
    """
    yield from _search(tuple((number, number) for number in numbers), target, limit)


def _search(pool: tuple[tuple[int, Tree], ...], target: int, limit: int) -> Iterator[Tree]:
    if len(pool) == 1:
        if pool[0][0] == target:
            yield pool[0][1]
        return
    for i, left in enumerate(pool):
        for j, right in enumerate(pool):
            if i == j:
                continue
            rest = tuple(item for k, item in enumerate(pool) if k not in (i, j))
            for op in "+-*/" if i < j else "-/":
                value = whole_result(op, left[0], right[0])
                if 0 < value <= limit:
                    yield from _search(((value, (op, left[1], right[1])), *rest), target, limit)


@lru_cache(maxsize=8)
def templates(count: int) -> tuple[Tree, ...]:
    """Every distinct rational function of ``count`` leaves, each used once: 1, 6, 68, 1170 for 1,
    2, 3, 4.

    Two trees are one template if they agree at two points modulo a large prime (so ``a-(b-c)`` is
    ``a+c-b``).
    """
    found = _functions((1 << count) - 1)
    return tuple(found.values())


_PRIME = (1 << 61) - 1
# Fixed points for the identity test; any numbers without small relations would do.
_POINTS = (
    (826_301_774_511, 93_480_226_117, 5_500_371_930_829, 71_203_998_443),
    (31_337_000_411, 7_777_123, 990_017, 65_539_117),
)
_Signature = tuple[int, ...]


@lru_cache(maxsize=64)
def _functions(mask: int) -> dict[_Signature, Tree]:
    """Signature -> first tree, over the leaves in the bit mask."""
    if mask.bit_count() == 1:
        leaf = mask.bit_length() - 1
        return {tuple(point[leaf] for point in _POINTS): leaf}
    found: dict[_Signature, Tree] = {}
    # Large left sides first: "(a + c) - b" is kept, not "a - (b - c)", whose steps are less often
    # positive.
    parts = sorted(
        (part for part in range(1, mask) if part & mask == part), key=lambda part: -part.bit_count()
    )
    for op in "-+/*":
        for part in parts:
            for left_key, left in _functions(part).items():
                for right_key, right in _functions(mask ^ part).items():
                    key = tuple(
                        _modular(op, a, b) for a, b in zip(left_key, right_key, strict=True)
                    )
                    found.setdefault(key, (op, left, right))
    return found


def _modular(op: str, left: int, right: int) -> int:
    if op == "+":
        return (left + right) % _PRIME
    if op == "-":
        return (left - right) % _PRIME
    return left * (right if op == "*" else pow(right, -1, _PRIME)) % _PRIME


def ratio(tree: Tree, numbers: Sequence[int]) -> tuple[int, int]:
    """The exact value of a template at ``numbers`` as (numerator, denominator); (0, 0) if
    undefined.
    """
    if isinstance(tree, int):
        return numbers[tree], 1
    op = tree[0]
    a, b = ratio(tree[1], numbers)
    c, d = ratio(tree[2], numbers)
    if not (b and d) or (op == "/" and c == 0):
        return 0, 0
    if op == "+":
        return a * d + c * b, b * d
    if op == "-":
        return a * d - c * b, b * d
    return (a * c, b * d) if op == "*" else (a * d, b * c)
