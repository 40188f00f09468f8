r"""Exact values of LaTeX arithmetic on rational numbers: ``-1\frac{4}{5}``, ``2 1/3``,
``\frac{1}{2^{98}}``, ``0.1+0.2``.

Grammar, after normalising: sums of products of signed powers; numbers are decimals or have commas
by thousands; a whole number before a proper fraction is a mixed number. Every size is bounded
before it is computed.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_BITS = 1 << 14
MAX_DEPTH = 12

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_TOKEN = re.compile(
    r"(?P<mixed>[0-9]+ "
    rf"[0-9]+/[0-9]+(?![0-9.,/^]))|(?P<number>(?:{_DIGITS})(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<frac>\\frac(?=\{))"
    r"|(?P<sign>\\cdot|\\times|\\div|[-+*/^(){}])"
)
_PLAIN = {"\\cdot": "*", "\\times": "*", "\\div": "/"}
_BASE = re.compile(
    r"([0-9][0-9A-Za-z]*|[A-Za-z]*[0-9][0-9A-Za-z]*)_(?:\{([0-9]{1,2})\}|([0-9]{1,2}))"
)


def exact_value(text: str) -> Fraction | None:
    """The value of a text that is nothing but rational arithmetic; None for any other, and beyond a
    bound.
    """
    if len(text) > MAX_CHARACTERS or not any(character.isdigit() for character in text):
        return None
    tokens = _tokens(text)
    if tokens is None:
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum(0)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return value if reader.at == len(tokens) else None


def based_number(text: str) -> tuple[str, int] | None:
    """(digits, base) of ``2516_8`` or ``A5_{11}``; None for anything else."""
    match = _BASE.fullmatch(text)
    return (match[1].upper(), int(match[2] or match[3])) if match else None


def _tokens(text: str) -> list[str] | None:
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        tokens.append(_PLAIN.get(match[0], match[0]))
    return tokens


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("too large")
    return value


class _Reader:
    """Recursive descent over the tokens; raises ValueError or IndexError where they are no
    arithmetic.
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, token: str) -> bool:
        found = self.next() == token
        self.at += found
        return found

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise ValueError(f"no {token}")

    def sum(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        sign = -1 if self.take("-") else 1
        if sign == 1:
            self.take("+")
        value = sign * self.product(depth)
        while self.next() in ("+", "-"):
            sign = -1 if self.take("-") else 1
            if sign == 1:
                self.take("+")
            value = _checked(value + sign * self.product(depth))
        return value

    def product(self, depth: int) -> Fraction:
        value = self.power(depth)
        while True:
            if self.take("*"):
                value = _checked(value * self.signed(depth))
            elif self.take("/"):
                value = _checked(value / self.signed(depth))
            elif self.next() == "(":
                value = _checked(value * self.power(depth))
            else:
                return value

    def signed(self, depth: int) -> Fraction:
        return -self.power(depth) if self.take("-") else self.power(depth)

    def power(self, depth: int) -> Fraction:
        base = self.atom(depth)
        if not self.take("^"):
            return base
        if self.next() == "{":
            exponent = self.group("{", "}", depth)
        else:
            sign = -1 if self.take("-") else 1
            exponent = sign * self.atom(depth)
        if exponent.denominator != 1 or self.next() == "^":
            raise ValueError("not a whole power")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent.numerator) > MAX_BITS:
            raise ValueError("too large")
        return _checked(base**exponent.numerator)

    def group(self, start: str, end: str, depth: int) -> Fraction:
        self.expect(start)
        value = self.sum(depth + 1)
        self.expect(end)
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.next()
        if token in ("(", "{"):
            return self.group(token, ")" if token == "(" else "}", depth)
        if token == "\\frac":
            self.at += 1
            return _checked(self.group("{", "}", depth) / self.group("{", "}", depth))
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise ValueError("no number")
        self.at += 1
        if " " in token:
            return _mixed(*map(int, re.split("[ /]", token)))
        whole = Fraction(token.replace(",", "").rstrip("."))
        if self.next() != "\\frac":
            return whole
        return self.mixed_fraction(whole, token)

    def mixed_fraction(self, whole: Fraction, token: str) -> Fraction:
        """``2\\frac{1}{3}``; anything but two whole numbers of a proper fraction is no mixed
        number.
        """
        parts = self.tokens[self.at : self.at + 7]
        shape = [part for part in parts if not part.isdigit()]
        if len(parts) != 7 or shape != ["\\frac", "{", "}", "{", "}"] or not token.isdigit():
            raise ValueError("no mixed number")
        self.at += 7
        return _mixed(whole.numerator, int(parts[2]), int(parts[5]))


def _mixed(whole: int, above: int, below: int) -> Fraction:
    if not 0 < above < below:
        raise ValueError("no proper fraction")
    return whole + Fraction(above, below)
