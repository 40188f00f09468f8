"""Answers in model-written text: numbers as exact rationals, balanced LaTeX boxes. Linear time on any text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

MAX_DIGITS = 30
MAX_NUMBER_CHARACTERS = 200
# Words that change the value of the number before them; no unit is guessed around them.
SCALES = frozenset("hundred thousand million billion trillion dozen dozens half halves quarter k m b x times percent".split())

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(rf"(?:-?\\?\$?|\\?\$-)({_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:/([0-9]+))?(?:\\?%)?")
_WORD = re.compile(r"[A-Za-z]+")
_BRACES = re.compile(r"(\\boxed[ \t\r\n]*\{)|\\[\\{}]|([{}])")


def parse_number(text: str, units: Iterable[str] = ()) -> Fraction | None:
    r"""The one number that ``text`` is, exactly; None if it is anything else or beyond a limit.

    ``1,234``, ``-5``, ``$5``, ``5.0``, ``.5``, ``1/3``, ``20%`` (20), a full stop at the end. Words of ``units`` (lower case)
    may follow, unless they scale (``million``). ASCII digits only, no exponents.
    """
    text = text.strip(" \t\r\n")
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    match = _NUMBER.match(text)
    if match is None or not _is_unit(text[match.end() :], frozenset(units)):
        return None
    digits, below = match[1].replace(",", "").rstrip("."), match[2] or "1"
    if max(len(digits), len(below)) > MAX_DIGITS or int(below) == 0 or (match[2] and "." in digits):
        return None
    value = Fraction(digits) / int(below)
    return -value if "-" in match[0] else value


def _is_unit(tail: str, units: frozenset[str]) -> bool:
    words = _WORD.findall(tail.lower())
    if not words:
        return tail.strip(" \t\r\n") in ("", ".")
    plain = re.fullmatch(r"[ \t\r\n]*[A-Za-z]+(?:[ \t\r\n]+[A-Za-z]+)*[ \t\r\n]*\.?", tail) is not None
    return plain and all(word in units and word not in SCALES for word in words)


def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case: the units that an answer to it may name."""
    return frozenset(_WORD.findall(text.lower()))


def boxed_spans(text: str) -> list[tuple[int, int]]:
    r"""Character spans (start, end) of the inside of each balanced ``\boxed{...}``, in order of their start.

    Escaped braces (``\{``) and boxes that never close count for nothing.
    """
    opened: list[tuple[bool, int]] = []
    spans = []
    for match in _BRACES.finditer(text):
        if match[1]:
            opened.append((True, match.end()))
        elif match[2] == "{":
            opened.append((False, match.end()))
        elif match[2] == "}" and opened:
            boxed, start = opened.pop()
            if boxed:
                spans.append((start, match.start()))
    return sorted(spans)


def last_boxed(text: str) -> str | None:
    r"""The inside of the last balanced ``\boxed{...}`` (of nested ones the innermost); None without one."""
    spans = boxed_spans(text)
    return text[slice(*spans[-1])] if spans else None


def merged_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same characters as disjoint spans in order."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def is_balanced(text: str) -> bool:
    """Whether every brace that is not escaped has its partner."""
    depth = 0
    for match in _BRACES.finditer(text):
        depth += -1 if match[2] == "}" else bool(match[1] or match[2])
        if depth < 0:
            return False
    return depth == 0
