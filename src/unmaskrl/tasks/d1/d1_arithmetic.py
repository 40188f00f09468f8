"""What Python's eval makes of a text of digits, dots, blanks, parentheses and + - * /, without eval
and within bounds.

d1's countdown reward and parser evaluate such texts with eval, so ``**``, ``//``, signs and
decimals count. Bounds on length, depth and the size of powers keep any text cheap; what lies beyond
them has no value, as if eval had failed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

MAX_TOKENS = 512
MAX_DEPTH = 90
MAX_BITS = 1 << 16
Number = int | float | complex

_BLANKS = " \t\x0c"
_TOKEN = re.compile(r"(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+|\*\*|//|[-+*/()]|[\r\n])")
_BINARY: dict[str, tuple[int, Callable[..., Number]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
}
_SIGN = 3
_POWER = 4


def python_value(text: str) -> Number | None:
    """The value of a Python expression; None if it has none (bad syntax, division by zero) or
    exceeds a bound.
    """
    tokens = _tokens(text.strip())
    if not tokens:
        return None
    parser = _Parser(tokens)
    try:
        value = parser.expression(0, 0)
    except (ArithmeticError, IndexError, TypeError, ValueError):
        return None
    return value if parser.at == len(tokens) else None


def _tokens(text: str) -> list[str] | None:
    tokens: list[str] = []
    depth = position = 0
    while position < len(text):
        if text[position] in _BLANKS:
            position += 1
            continue
        match = _TOKEN.match(text, position)
        if match is None or len(tokens) == MAX_TOKENS:
            return None
        token = match[0]
        position = match.end()
        depth += (token == "(") - (token == ")")
        if token in "\r\n":
            # A line end is free inside parentheses and ends the expression outside.
            if depth <= 0:
                return None
            continue
        tokens.append(token)
    return tokens


class _Parser:
    """Precedence climbing over the tokens; raises ValueError or IndexError where they are no
    expression.
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def expression(self, lowest: int, depth: int) -> Number:
        """The longest expression from here whose operators bind at least as tightly as
        ``lowest``.
        """
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        left = self._operand(depth)
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token == "**" and lowest <= _POWER:
                self.at += 1
                # Right associative, and a sign may stand in the exponent: 2 ** -1.
                left = _power(left, self.expression(_SIGN, depth + 1))
            elif token in _BINARY and _BINARY[token][0] >= lowest:
                self.at += 1
                level, apply = _BINARY[token]
                left = _bounded(apply(left, self.expression(level + 1, depth + 1)))
            else:
                break
        return left

    def _operand(self, depth: int) -> Number:
        token = self.tokens[self.at]
        self.at += 1
        if token in "+-":
            # A sign binds less tightly than a power: -2 ** 2 is -4.
            value = self.expression(_SIGN, depth + 1)
            return -value if token == "-" else value
        if token == "(":
            value = self.expression(0, depth + 1)
            if self.tokens[self.at] != ")":
                raise ValueError("unbalanced")
            self.at += 1
            return value
        if "." in token:
            return float(token)
        if token.startswith("0") and token.strip("0"):
            raise ValueError("leading zero")
        return _bounded(int(token))


def _power(base: Number, exponent: Number) -> Number:
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * exponent > MAX_BITS
    ):
        raise ValueError("too large")
    return _bounded(base**exponent)


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("too large")
    return value
