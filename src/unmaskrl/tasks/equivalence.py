r"""Whether two LaTeX answers mean the same: normalised text, then exact numbers, then math-verify on short, tame ones.

math-verify (sympy) is an optional extra. ``verify_latex`` is its only call, in a guarded process (tasks/guard.py); what is
known to grow without bound is refused before it, since a worker that was killed takes seconds to come back.
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache

from unmaskrl.tasks.answers import is_balanced, parse_number
from unmaskrl.tasks.guard import Guard

ALGEBRA = Guard("unmaskrl.tasks.equivalence_worker:verify_latex", seconds=3.0)
MAX_CHARACTERS = 150
MAX_DEPTH = 6
MAX_TEXT = 2000
_MISSING = "the task math needs math-verify to compare answers: pip install 'unmaskrl[tasks]'"

_DROPPED = re.compile(
    r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle|,|;|:|!|quad|qquad)(?![A-Za-z])"
    r"|\\?\$|\\?%|\^\{?\\circ\}?|(?<!\\)\\ |[ \t\r\n]|~"
)
_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\{[ \t]+[^{}]*\}(?:\^\{?[23]\}?)?$")
_WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit)\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:([0-9a-zA-Z])|(\{[^{}]*\}))(?:([0-9a-zA-Z])|(\{[^{}]*\}))")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9a-zA-Z])")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_NAME = re.compile(r"\\?[A-Za-z]=(?!=)")
# What takes seconds to hours, as measured: sums, limits and integrals are evaluated, products and powers of brackets are
# expanded, unions and bars are tried against each other, powers of powers and long numbers explode.
_WILD = re.compile(
    r"\\(?:sum|prod|[io]*int|lim|[dt]?binom)|[0-9]{16}|\^(?:\{[^{}]*\^|\{?-?[0-9]{4}|[0-9a-zA-Z]\^)|[0-9]{3}!|[!)}\]]!"
    r"|[)}\]]\^\{?-?[0-9]{2}|(?:\)[^()]*\(.*){4}|(?:\\cup.*){4}|(?:\|.*){7}|(?:\^.*){9}"
)


def normalise(text: str) -> str:
    r"""A LaTeX answer without what does not matter: spaces, ``\left``, ``$``, ``%``, degrees, a unit at the end, ``x=``.

    ``\dfrac12``, ``1/2`` become ``\frac{1}{2}``; ``\sqrt3`` becomes ``\sqrt{3}``; ``\text{red}`` becomes ``red``.
    """
    text = _UNIT.sub("", text.strip().rstrip("."))
    text = _WRAPPED.sub(r"\1", text)
    text = _DROPPED.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).rstrip(".")
    text = _NAME.sub("", text, count=1) if _NAME.match(text) else text
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_FRACTION.sub(_full_fraction, text)
    slash = _SLASH.fullmatch(text)
    return f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}" if slash else text


def _full_fraction(match: re.Match[str]) -> str:
    above, below = match[2] or f"{{{match[1]}}}", match[4] or f"{{{match[3]}}}"
    return f"\\frac{above}{below}"


@lru_cache(maxsize=4096)
def equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer`` (model-written) means ``gold``. Raises ValueError if math-verify is needed and missing."""
    if len(answer) > MAX_TEXT or not is_balanced(answer):
        return False
    wanted, got = normalise(gold), normalise(answer)
    if not got:
        return False
    if wanted == got:
        return True
    numbers = parse_number(wanted), parse_number(got)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _comparable(wanted, got) and verify_latex(wanted, got)


def _comparable(wanted: str, got: str) -> bool:
    """Whether the two may be handed to a computer algebra system, which takes points for sets and 6=5 for 5."""
    if len(wanted) > MAX_CHARACTERS or not _is_tame(got):
        return False
    if "=" in got and "=" not in wanted:
        return False
    ordered = "," in wanted and wanted[0] in "(["
    return not ordered or (got[0], got[-1]) == (wanted[0], wanted[-1])


def _is_tame(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return len(text) <= MAX_CHARACTERS and deepest <= MAX_DEPTH and not _WILD.search(text)


def verify_latex(gold: str, answer: str) -> bool:
    """math-verify's verdict on two LaTeX expressions; False where it fails or takes too long."""
    check_installed()
    return bool(ALGEBRA.call(gold, answer, default=False))


def check_installed() -> None:
    """Raise ValueError if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(_MISSING)
