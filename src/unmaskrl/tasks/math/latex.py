r"""LaTeX answers in a normal form, and their parts: items of a list, what stands before ``=``,
brackets, units.

Blanks are dropped but between two digits, which are never joined; words of ``\text{...}`` stand in
quotation marks until it is known whether they are a unit, a separator of a list or the answer
itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from unmaskrl.tasks.math.units import UNITS, could_be_unit, is_unit, unit_name
from unmaskrl.tasks.math.wrapping import plain_signs, unwrap

MAX_ITEMS = 64

_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|,?\\!|\\,)[0-9]{3})+(?![0-9])")
_BETWEEN = re.compile(r"\{,\}|,|\\!|\\,")
_BLANK = re.compile(
    r"(?<!\\)\\(?:,|;|:|!|quad(?![A-Za-z])|qquad(?![A-Za-z]))|(?<!\\)\\[ ]|[ \t\r\n~]"
)
_DROPPED = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])"
    r"|\\?\$|\\?%|\^(?:\{(?:\\circ|\\degree)\}|\\circ(?![A-Za-z]))"
    r"|\\degree(?![A-Za-z])|(?<!\\)\\[()\[\]]"
)
_WORDS = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|textit|textrm|mathbf|mathit|textnormal)\{([^{}]*)\}"
)
_SHORT_FRACTION = re.compile(
    r"\\frac ?(?:([0-9a-zA-Z])|(\{[^{}]*\}))(?:([0-9a-zA-Z])|(\{[^{}]*\}))"
)
_SHORT_ROOT = re.compile(r"\\sqrt ?([0-9a-zA-Z])")
_SAME = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("\\varnothing", "\\emptyset"),
    ("\\{\\}", "\\emptyset"),
    ("\\lbrace", "\\{"),
    ("\\rbrace", "\\}"),
)
# One character each, whatever the spelling; spelt out again for the computer algebra.
_SPELLINGS = {
    "leqslant": "\u2264",
    "leq": "\u2264",
    "le": "\u2264",
    "geqslant": "\u2265",
    "geq": "\u2265",
    "ge": "\u2265",
    "lt": "<",
    "gt": ">",
    "approx": "\u2248",
    "simeq": "\u2248",
    "in": "\u2208",
    "cup": "\u222a",
}
_SPELT = re.compile(rf"(?<!\\)\\({'|'.join(_SPELLINGS)})(?![A-Za-z])")
_LATEX = {
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u2248": "\\approx ",
    "\u2208": "\\in ",
    "\u222a": "\\cup ",
}
_QUOTED_UNIT = re.compile(r'(?<=[0-9A-Za-z)}\].]) ?"([^"]*)"(?:\^\{?([23])\}?)?$')
_BARE_UNIT = re.compile(
    r"(?<=[0-9}]) ([A-Za-z]{2,}(?: [A-Za-z]+){0,4})(?:\^\{?([23])\}?)?$|(?<=[0-9])([A-Za-z]{2,})$"
)
_OR = re.compile(r'[ ]*,?[ ]*(?:"[ ]*(?:or|and)[ ]*"|(?<=[ ])(?:or|and)(?=[ ]))[ ]*')
_HALF_OR = re.compile(r'"([^"]*)"')
_LEADING = re.compile(r"(?:\u2248|\\Rightarrow|\\implies|\\therefore|[=:])+")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])(?<!begin\{)(?<!end\{)[A-Za-z]{4,}")
_COMMAND_END = re.compile(r"\\[A-Za-z]+$")


@dataclass(frozen=True, slots=True)
class Form:
    """A normalised answer: its text, whether words stand in it, and the unit that was taken off its
    end.
    """

    text: str
    wordy: bool
    unit: tuple[str, ...]


def normal_form(
    text: str, words: frozenset[str] | None = None, bare: frozenset[str] = UNITS
) -> Form:
    r"""The normal form of a LaTeX answer: wrappers, ``\left``, ``$``, ``%``, degrees and a unit at
    the end are gone.

    ``\dfrac12`` becomes ``\frac{1}{2}``, ``\sqrt3`` ``\sqrt{3}``, ``\text{red}`` ``red``. A unit is
    made of ``words`` in ``\text{...}`` or of ``bare`` ones behind a number; with None (a gold
    answer) of any words that neither scale nor hedge.
    """
    text = unwrap(plain_signs(text).replace('"', ""))
    text = _THOUSANDS.sub(lambda number: _BETWEEN.sub("", number[0]), text)
    for old, new in _SAME:
        text = text.replace(old, new) if old in text else text
    text = _SPELT.sub(lambda match: _SPELLINGS[match[1]], text)
    text = _DROPPED.sub(" ", _WORDS.sub(r'"\1"', text))
    text = unwrap(_BLANK.sub(" ", text))
    text, unit = _without_unit(text, words, bare)
    text = _OR.sub(",", _HALF_OR.sub(_separators, text))
    wordy = any(
        any(len(word) > 1 for word in re.findall("[A-Za-z]+", part))
        for part in _HALF_OR.findall(text)
    )
    text = _tight(unwrap(text.replace('"', " ")))
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(_full_fraction, text)
    text = _LEADING.sub("", text, count=1) if _LEADING.match(text) else text
    return Form(text.removeprefix("+"), wordy or _LONG_WORD.search(text) is not None, unit)


def normalise(text: str) -> str:
    """The text of a gold answer's normal form."""
    return normal_form(text).text


def _without_unit(
    text: str, words: frozenset[str] | None, bare: frozenset[str]
) -> tuple[str, tuple[str, ...]]:
    match = _QUOTED_UNIT.search(text.rstrip())
    if match is not None:
        fits = could_be_unit(match[1]) if words is None else is_unit(match[1], words)
        single = match[1] == match[1].strip() and len(match[1]) == 1 and words is None
        return (
            (text[: match.start()], unit_name(match[1], match[2] or ""))
            if fits and not single
            else (text, ())
        )
    match = _BARE_UNIT.search(text.rstrip())
    if match is not None and is_unit(match[1] or match[3], bare):
        return text[: match.start()], unit_name(match[1] or match[3], match[2] or "")
    return text, ()


def _separators(match: re.Match[str]) -> str:
    """``" or 6"`` as ``" or "6``: the words between the items of a list, taken out of a longer
    quotation.
    """
    parts = re.split(r"(?:^|(?<=[ ,]))(or|and)(?=[ ]|$)", match[1])
    if len(parts) == 1:
        return match[0]
    return "".join(
        f'"{part}"' if part in ("or", "and") else (f'"{part}"' if part.strip() else "")
        for part in parts
    )


def _tight(text: str) -> str:
    """Without blanks, but one between two digits (or a comma and a digit, which would be a
    thousand).
    """
    parts = text.split()
    result = parts[0] if parts else ""
    for part in parts[1:]:
        joins = result[-1:].isdigit() and (part[0].isdigit() or part[0] in ".,")
        thousand = result[-1:] == "," and result[-2:-1].isdigit() and part[0].isdigit()
        command = part[0].isalpha() and _COMMAND_END.search(result[-16:]) is not None
        result += f" {part}" if joins or thousand or command or result[-1:] == "." else part
    return result


def _full_fraction(match: re.Match[str]) -> str:
    above = match[2] or f"{{{match[1]}}}"
    below = match[4] or f"{{{match[3]}}}"
    return f"\\frac{above}{below}"


_PIECE = re.compile(r"\\begin\{[a-z]+\}|\\end\{[a-z]+\}|\\\\|\\[A-Za-z]+|\\.|.", re.DOTALL)


def split_top(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    r"""(separator before it, part) for the parts of a text between separators that stand outside
    all brackets.
    """
    parts: list[tuple[str, str]] = []
    depth = 0
    start = 0
    before = ""
    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece in ("(", "[", "{", "\\{", "\\langle") or piece.startswith("\\begin{"):
            depth += 1
        elif piece in (")", "]", "}", "\\}", "\\rangle") or piece.startswith("\\end{"):
            depth -= 1
        elif depth == 0 and piece in separators:
            parts.append((before, text[start : match.start()].strip()))
            before = piece
            start = match.end()
    return [*parts, (before, text[start:].strip())]


_CUT = frozenset(",;")
_EQUAL = frozenset("=\u2248")
_GREEK = (
    "alpha|beta|gamma|delta|theta|phi|varphi|omega|lambda|mu|sigma|rho|tau|psi|epsilon|ell|Delta"
)
_LETTER = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![A-Za-z]))"
_SUBSCRIPT = r"(?:_(?:\{[0-9A-Za-z,]{1,8}\}|[0-9A-Za-z]))?"
_SINGLE = rf"{_LETTER}'{{0,2}}{_SUBSCRIPT}"
_NAME = re.compile(
    rf"{_SINGLE}(?:\+{_SINGLE})*"
    rf"|[A-Za-z]{{2,12}}"
    rf"|{_SINGLE}(?:\^\{{-1\}})?\([^()=]{{1,24}}\)"
    r"|m?\\(?:angle|triangle|measuredangle) ?\{?[A-Za-z]{1,3}\}?"
    r"|\\(?:overline|widehat|vec|bar|hat|mathcal|overrightarrow) ?\{?[A-Za-z]{1,3}\}?"
    r"|\|[A-Za-z]{1,3}\||\[[A-Z]{3,6}\]"
    rf"|\\(?:sin|cos|tan|cot|sec|csc) ?(?:{_SINGLE}|\({_SINGLE}\)|\\angle ?[A-Za-z]{{1,3}})"
    rf"|\({_SINGLE}(?:,{_SINGLE}){{1,4}}\)"
)
_IN = re.compile(rf"({_SINGLE})\u2208")


@dataclass(frozen=True, slots=True)
class Item:
    """One answer of a list: the name before ``=`` ("" without one), and the values that are said to
    be equal.

    ``about``: whether a sign for "about" stands between the values.
    """

    name: str
    values: tuple[str, ...]
    about: bool


def items_of(text: str) -> list[Item]:
    """The items of a list, each with its name and values; one item for anything else."""
    return [_item(part) for _, part in split_top(text, _CUT)]


def _item(text: str) -> Item:
    member = _IN.match(text)
    if member is not None:
        return Item(member[1], (text[member.end() :].strip(),), False)
    parts = split_top(text, _EQUAL)
    name = ""
    while len(parts) > 1 and is_name(parts[0][1]):
        name = name or parts[0][1]
        parts = [("", parts[1][1]), *parts[2:]]
    if len(parts) == 2 and not name and is_name(parts[1][1]):
        name = parts[1][1]
        parts = parts[:1]
    about = any(sign == "\u2248" for sign, _ in parts)
    return Item(name, tuple(part for _, part in parts), about)


def is_name(text: str) -> bool:
    r"""Whether a text only names what the answer is: ``x``, ``AB``, ``f(x)``, ``x_1``,
    ``\angle A``, ``\theta``, ``(x,y)``.
    """
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Group:
    """Parts in brackets: ``kind`` is the pair of brackets (or a matrix's name), ``ordered`` whether
    their order counts.
    """

    kind: str
    parts: tuple[str, ...]
    ordered: bool


_MATRIX = re.compile(r"\\begin\{([pbvVB]?matrix|array)\}(.*)\\end\{\1\}", re.DOTALL)
_ENDS = {"(": ")]", "[": ")]", "\\{": ("\\}",), "\\langle": ("\\rangle",)}


def group_of(text: str) -> Group | None:
    r"""A tuple, an interval, a set, a union or a matrix as its parts; None for anything else."""
    united = split_top(text, frozenset("\u222a"))
    if len(united) > 1:
        return Group("union", tuple(part for _, part in united), False)
    matrix = _MATRIX.fullmatch(text)
    if matrix is not None:
        rows = [
            [cell for _, cell in split_top(row, frozenset("&"))]
            for _, row in split_top(matrix[2], frozenset(["\\\\"]))
        ]
        rows = [row for row in rows if row != [""]]
        kind = {"b": "p", "a": "p"}.get(matrix[1][0], matrix[1][0])
        return Group(
            f"{kind}{[len(row) for row in rows]}", tuple(cell for row in rows for cell in row), True
        )
    for start, ends in _ENDS.items():
        for end in ends:
            if text.startswith(start) and text.endswith(end) and _encloses(text, start, end):
                parts = split_top(text[len(start) : len(text) - len(end)], _CUT)
                if len(parts) > 1 or start == "\\{":
                    return Group(start + end, tuple(part for _, part in parts), start != "\\{")
    return None


def _encloses(text: str, start: str, end: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depth = 0
    for match in _PIECE.finditer(text):
        depth += match[0] in ("(", "[", "{", "\\{", "\\langle")
        depth -= match[0] in (")", "]", "}", "\\}", "\\rangle")
        if depth == 0:
            return match.end() == len(text)
    return False


_VARIABLE = rf"(?P<var>{_SINGLE})"
_BETWEEN_BOUNDS = re.compile(
    rf"(?P<low>[^<>\u2264\u2265]+)(?P<first>[<\u2264]){_VARIABLE}(?P<second>[<\u2264])"
    rf"(?P<high>[^<>\u2264\u2265]+)"
)
_ONE_BOUND = re.compile(rf"{_VARIABLE}(?P<sign>[<>\u2264\u2265])(?P<bound>[^<>\u2264\u2265]+)")
_BOUND_FIRST = re.compile(rf"(?P<bound>[^<>\u2264\u2265]+)(?P<sign>[<>\u2264\u2265]){_VARIABLE}")
_TURNED = {"<": ">", ">": "<", "\u2264": "\u2265", "\u2265": "\u2264"}
_RELATION = re.compile(r"[<>=\u2264\u2265\u2248\u2208]|\\neq?(?![A-Za-z])")


def has_relation(text: str) -> bool:
    """Whether a sign that relates two sides stands in a normalised text."""
    return _RELATION.search(text) is not None


def interval_of(text: str) -> str:
    r"""``-2\le x<7`` as ``[-2,7)``, ``x>2`` as ``(2,\infty)``; any other text as it is."""
    match = _BETWEEN_BOUNDS.fullmatch(text)
    if match is not None:
        start = "(" if match["first"] == "<" else "["
        end = ")" if match["second"] == "<" else "]"
        return f"{start}{match['low']},{match['high']}{end}"
    match = _ONE_BOUND.fullmatch(text)
    sign = match["sign"] if match else ""
    if match is None:
        match = _BOUND_FIRST.fullmatch(text)
        sign = _TURNED[match["sign"]] if match else ""
    if match is None:
        return text
    if sign in "<\u2264":
        return f"(-\\infty,{match['bound']}{')' if sign == '<' else ']'}"
    return f"{'(' if sign == '>' else '['}{match['bound']},\\infty)"


def as_latex(text: str) -> str:
    """A normalised text with its relations as LaTeX commands again."""
    return "".join(_LATEX.get(character, character) for character in text)
