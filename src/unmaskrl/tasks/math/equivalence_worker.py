"""What runs in the guard's worker for the task math: the only place that imports math-verify and
sympy.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import Any

# Before the guard's limits, which count memory and time from here.
_MATH: Any = importlib.import_module("math_verify")
_SYMPY: Any = importlib.import_module("sympy")
_RANDOM: Any = importlib.import_module("sympy.core.random")
# they warn, once a process, that they have no time limit: the guard has
for _name in ("parser", "grader"):
    logging.getLogger(f"math_verify.{_name}").setLevel(logging.ERROR)


# Where two expressions are compared: positive, so that roots and logarithms have one value.
_POINTS = ((13, 7), (5, 11), (29, 3))
_DIGITS = 60
_SMALL: Any = _SYMPY.Float(10) ** (10 - _DIGITS)


def verify_latex(gold: str, answer: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; whatever it raises is the guard's default.

    It compares with a tolerance where a decimal is among them, so what it calls equal must have
    equal values, to 50 digits; that is looked at first, since most wrong answers end there.
    """
    # it tests equality at random points, and verdicts must not depend on what came before
    _RANDOM.seed(0)
    sides = [_parsed(side) for side in (gold, answer)]
    if not all(sides) or not _agree(sides[0][0], sides[1][0]):
        return False
    if all(isinstance(side[0], _SYMPY.Eq) and side[0].free_symbols for side in sides):
        # Their differences have one ratio everywhere: the same curve, which math-verify does not
        # always see.
        return True
    return bool(_MATH.verify(*(list(side) for side in sides), timeout_seconds=None))


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a text: an expression and the text that it read."""
    config = [_MATH.LatexExtractionConfig(boxed_match_priority=0)]
    limits: Any = {
        "fallback_mode": "no_fallback",
        "extraction_mode": "first_match",
        "parsing_timeout": 0,
    }
    return tuple(_MATH.parse(f"\\boxed{{{text}}}", config, **limits))


def _agree(gold: Any, answer: Any) -> bool:
    """Whether two expressions have the same letters and the same values at some points; True for
    what has no value.

    Two equations agree if their differences of sides have one ratio at all points.
    """
    sides = [_difference(side) for side in (gold, answer)]
    if not all(isinstance(side, _SYMPY.Expr) for side in sides):
        return True
    sides = [_exact(side) for side in sides]
    if sides[0].free_symbols != sides[1].free_symbols:
        return False
    letters = sorted(sides[0].free_symbols, key=str)
    ratios = []
    for first, step in _POINTS if letters else _POINTS[:1]:
        values = {
            letter: _SYMPY.Rational(first + step * place, 17)
            for place, letter in enumerate(letters)
        }
        one, other = (_SYMPY.N(side.subs(values), _DIGITS) for side in sides)
        if not all(value.is_number and value.is_finite for value in (one, other)):
            continue
        if other == 0 or one == 0:
            if one != other and abs(one - other) > _SMALL:
                return False
            continue
        ratios.append(one / other)
    equations = isinstance(gold, _SYMPY.Eq) and isinstance(answer, _SYMPY.Eq)
    if equations and len(ratios) < len(_POINTS):
        return False
    wanted = ratios[:1] if equations else [_SYMPY.Integer(1)]
    return all(
        abs(ratio - target) <= _SMALL * max(1, abs(target)) for ratio in ratios for target in wanted
    )


def _difference(side: Any) -> Any:
    """An equation as the difference of its sides; anything else as it is."""
    return side.lhs - side.rhs if isinstance(side, _SYMPY.Eq) else side


def _exact(expression: Any) -> Any:
    """The expression evaluated, its decimals as fractions."""
    expression = expression.doit()
    floats = {number: _SYMPY.Rational(str(number)) for number in expression.atoms(_SYMPY.Float)}
    return expression.xreplace(floats)
