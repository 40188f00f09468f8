"""Answers in model-written text: numbers as exact rationals, balanced LaTeX boxes. Linear time on
any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from unmaskrl.tasks.math.latex import items_of, normal_form
from unmaskrl.tasks.math.latex_numbers import exact_value

MAX_DIGITS = 30
MAX_NUMBER_CHARACTERS = 200
MAX_BODY = 50_000

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    rf"[+-]?(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+|(?:[0-9]+ "
    rf")?[0-9]+/[0-9]+|(?:[0-9]+)?\\frac\{{[0-9]+\}}\{{[0-9]+\}})"
)
_PERCENT = re.compile(r"(?<=[0-9])[ ]*(?:percent|\\text\{[ ]*percent[ ]*\})(?=[ .]*$)")
_PART_OF = re.compile(r"%[ \t$\\]*[0-9/]")
_BRACES = re.compile(r"(\\(?:boxed|fbox)[ \t\r\n]*\{)|\\[\\{}]|([{}])")
# TeX boxes one token; whoever leaves the braces out means the next word.
_LOOSE_BOX = re.compile(r"\\boxed[ \t]+(?!\{)((?:[^ \t\r\n$<>{}\\]|\\[A-Za-z]+|\{[^{}]*\})+)")


def parse_number(text: str, units: Iterable[str] = ()) -> Fraction | None:
    r"""The one number that ``text`` is, exactly; None if it is anything else or beyond a limit.

    ``1,234``, ``-5``, ``$5``, ``5.0``, ``.5``, ``1/3``, ``2 1/3``, ``\frac{1}{3}``, ``20%`` (20),
    in ``$..$``, a box, bold and the like, after a name (``x =``) or arithmetic that is true
    (``6*7 =``). Words of ``units`` (lower case, singular or plural) may follow, unless they scale
    (``million``) or hedge. ASCII digits only, no exponents.
    """
    text = text.strip(" \t\r\n")
    if len(text) > MAX_NUMBER_CHARACTERS or _PART_OF.search(text):
        return None
    words = frozenset(units)
    form = normal_form(_PERCENT.sub("%", text), words, words)
    whole = exact_value(form.text) is not None
    items = [] if whole else items_of(form.text)
    values = (
        (form.text,) if whole else items[0].values if len(items) == 1 and not items[0].about else ()
    )
    if not values or _NUMBER.fullmatch(values[-1]) is None or form.wordy:
        return None
    if max(map(len, re.findall("[0-9]+", values[-1].replace(",", "")))) > MAX_DIGITS:
        return None
    exact = [exact_value(value) for value in values]
    return exact[-1] if len(set(exact)) == 1 else None


def gold_text(answer: str) -> str:
    """What follows ``####`` in an answer column; the whole column without it."""
    return answer.split("####")[-1].strip()


def boxed_spans(text: str) -> list[tuple[int, int]]:
    r"""Character spans (start, end) of the inside of each balanced ``\boxed{...}`` or
    ``\fbox{...}``, in order of their start.

    ``\boxed 5`` is read as well, up to a blank. Escaped braces (``\{``) and boxes that never close
    count for nothing.
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return []
    opened: list[tuple[bool, int]] = []
    spans = [_loose(match) for match in _LOOSE_BOX.finditer(text)]
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


def _loose(match: re.Match[str]) -> tuple[int, int]:
    return match.start(1), match.start(1) + len(match[1].rstrip(".,;:)"))


def last_boxed(text: str) -> str | None:
    r"""The inside of the last balanced ``\boxed{...}`` (of nested ones the innermost); None without
    one.
    """
    spans = boxed_spans(text)
    return text[slice(*spans[-1])] if spans else None


def final_answer(body: str) -> str:
    """The last balanced box of an answer's body, or the body; a body that is too long for any
    answer is not searched.
    """
    boxed = last_boxed(body) if len(body) <= MAX_BODY else None
    return body if boxed is None else boxed


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
