"""The grammar against hand cases and an independent oracle; trees and templates against brute
force.
"""

from __future__ import annotations

import ast
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmaskrl.tasks.puzzles import arithmetic
from unmaskrl.tasks.puzzles.arithmetic import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_TOKENS,
    parse,
    templates,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0", 0),
        ("( 3 * 7 ) + 12", 33),
        ("2+3*4", 14),
        ("20-5-3", 12),
        ("8/4/2", 1),
        ("8/(4/2)", 4),
        ("1/3*3", 1),
        ("1/3+1/6", Fraction(1, 2)),
        ("2-5", -3),
        ("((((1))))", 1),
        ("\n 1\t+\r2 ", 3),
        ("999999*999999", 999998000001),
    ],
)
def test_values_are_exact(text: str, value: Fraction | int) -> None:
    parsed = parse(text)
    assert parsed is not None and parsed.value == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "(1", "1)", ")1(", "1+", "+1", "-1", "2*-3", "1 2", "(1)(2)", "2(3)", "1+*2",
        "9**9**9", "7//2", "1.0", "1e3", "0x10", "1_000", "007", "00", "1234567", "3*7=21",
        "a+b", "1,2", "2^3", "1%2",
        "1\x002", "\x00", "\u0661+1", "\uff11+1", "1\u00d72", "1\u22122", "1\u00a0+1", "1\u0301+1",
        "\u00b2+1", "1+1;", "(1+2]", "__import__('os')",
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    assert parse(text) is None


def test_division_by_zero_is_an_expression_without_value() -> None:
    for text in ("1/0", "1/(2-2)", "0/0", "5/(1/0)", "0*(1/0)"):
        parsed = parse(text)
        assert parsed is not None and parsed.value is None


def test_limits_are_sharp() -> None:
    assert parse("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) is not None
    assert parse("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)) is None
    longest = "+".join("1" * ((MAX_TOKENS + 1) // 2))
    assert arithmetic.tokenize(longest + "+") is not None
    assert parse(longest) is not None
    assert parse(longest + "+1") is None
    assert parse("1" + " " * (MAX_CHARACTERS - 1)) is not None
    assert parse("1" + " " * MAX_CHARACTERS) is None


def test_numbers_are_listed_from_left_to_right() -> None:
    parsed = parse("3*(20-4)/3")
    assert parsed is not None and parsed.numbers == (3, 20, 4, 3)


Oracle = tuple[str, Fraction | None, int]
LEVEL = {"+": 1, "-": 1, "*": 2, "/": 2}


def _combine(left: Oracle, op: str, right: Oracle, blank: str) -> Oracle:
    """Write only the parentheses that are needed; compute the value on the way (None:
    undefined).
    """
    level = LEVEL[op]
    a = left[0] if left[2] >= level else f"({left[0]})"
    b = right[0] if right[2] > level else f"({blank}{right[0]})"
    text = f"{a}{blank}{op}{blank}{b}"
    if left[1] is None or right[1] is None or (op == "/" and right[1] == 0):
        return text, None, level
    value = {
        "+": left[1].__add__,
        "-": left[1].__sub__,
        "*": left[1].__mul__,
        "/": left[1].__truediv__,
    }
    return text, value[op](right[1]), level


ATOMS = st.integers(0, 999).map(lambda number: (str(number), Fraction(number), 3))
ORACLES = st.recursive(
    ATOMS,
    lambda inner: st.builds(
        _combine, inner, st.sampled_from("+-*/"), inner, st.sampled_from(["", " ", "\t "])
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(ORACLES)
def test_parser_agrees_with_random_trees(oracle: Oracle) -> None:
    text, value, _ = oracle
    parsed = parse(text)
    assert parsed is not None, text
    assert parsed.value == value, text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/() ", max_size=40))
def test_accepted_texts_agree_with_python_syntax(text: str) -> None:
    """What we accept, Python reads as the same kind of expression (ast only; nothing is
    evaluated).
    """
    if parse(text) is not None:
        kinds = {type(node) for node in ast.walk(ast.parse(text.strip(), mode="eval"))}
        allowed = {ast.Expression, ast.BinOp, ast.Constant, ast.Add, ast.Sub, ast.Mult, ast.Div}
        assert kinds <= allowed, text


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 67), st.lists(st.integers(1, 30), min_size=3, max_size=3))
def test_trees_survive_text(index: int, numbers: list[int]) -> None:
    tree = arithmetic.fill(templates(3)[index], numbers)
    text = arithmetic.render(tree)
    assert arithmetic.parse_tree(text) == tree
    numerator, denominator = arithmetic.ratio(templates(3)[index], numbers)
    parsed = parse(text)
    assert parsed is not None
    assert parsed.value == (Fraction(numerator, denominator) if denominator else None)


def test_parse_tree_refuses_what_parse_refuses() -> None:
    assert arithmetic.parse_tree("1 2") is None
    assert arithmetic.parse_tree("1 + x") is None


def test_template_counts() -> None:
    """OEIS A140606: distinct values of n independent variables under + - * /, each used once."""
    assert [len(templates(count)) for count in (1, 2, 3, 4)] == [1, 6, 68, 1170]


def test_templates_reach_what_brute_force_reaches() -> None:
    numbers = (3, 7, 19)
    reached = {arithmetic.ratio(tree, numbers) for tree in templates(3)}
    ours = {Fraction(*pair) for pair in reached if pair[1]}
    brute = set()
    for (a, b, c), first, second in product(permutations(numbers), "+-*/", "+-*/"):
        for text in (f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"):
            parsed = parse(text)
            brute.add(parsed.value if parsed else None)
    assert ours == brute - {None}


def test_ratio_never_hides_a_division_by_zero() -> None:
    assert arithmetic.ratio(("/", 0, ("/", 1, ("-", 2, 3))), (5, 7, 4, 4)) == (0, 0)
    assert arithmetic.ratio(("*", ("/", 0, ("-", 2, 3)), 1), (5, 7, 4, 4)) == (0, 0)


def test_whole_steps_by_hand() -> None:
    assert arithmetic.whole_steps(("+", ("*", 3, 7), 12), 100) == [
        (3, "*", 7, 21),
        (21, "+", 12, 33),
    ]
    assert arithmetic.whole_steps(("+", ("*", 3, 7), 12), 32) is None
    assert arithmetic.whole_steps(("+", ("-", 3, 7), 12), 100) is None
    assert arithmetic.whole_steps(("+", ("-", 7, 7), 12), 100) is None
    assert arithmetic.whole_steps(("*", ("/", 3, 7), 14), 100) is None


def test_programs_agree_with_steps() -> None:
    for tree in templates(4)[::13]:
        steps = arithmetic.program(tree, 4)
        for numbers in ((12, 3, 8, 2), (5, 20, 1, 4), (7, 7, 7, 7)):
            worked = arithmetic.whole_steps(arithmetic.fill(tree, numbers), 100)
            assert arithmetic.whole_value(steps, numbers, 100) == (worked[-1][3] if worked else 0)


def test_solution_search_by_hand() -> None:
    found = [arithmetic.render(tree) for tree in arithmetic.solution_trees((3, 7, 12), 33, 100)]
    assert found == ["( 3 * 7 ) + 12"]
    assert list(arithmetic.solution_trees((1, 1, 1), 50, 100)) == []
    assert list(arithmetic.solution_trees((20, 10, 3), 600, 599)) == []


def test_solution_search_finds_every_target_a_template_reaches() -> None:
    numbers = (12, 3, 8)
    steps = [arithmetic.whole_steps(arithmetic.fill(tree, numbers), 100) for tree in templates(3)]
    targets = {worked[-1][3] for worked in steps if worked}
    assert len(targets) > 10
    for target in range(1, 101):
        assert any(arithmetic.solution_trees(numbers, target, 100)) or target not in targets


def test_canonical_ignores_swaps_only() -> None:
    assert arithmetic.canonical(("+", 2, ("*", 5, 3))) == arithmetic.canonical(
        ("+", ("*", 3, 5), 2)
    )
    assert arithmetic.canonical(("-", 2, 5)) != arithmetic.canonical(("-", 5, 2))
