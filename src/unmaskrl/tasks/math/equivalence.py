r"""Whether two LaTeX answers mean the same: structure and exact numbers here, single expressions by
math-verify.

Lists, tuples, sets, intervals, matrices, chains of ``=`` and names before them, bases and words are
read here, since math-verify takes points for sets, 6=5 for 5, drops bases, words and repeated
members, and compares decimals with a tolerance. It is an optional extra; ``verify_latex`` is its
only call, in a guarded process (sandbox/guard.py), and what is known to grow without bound is
refused before it, since a worker that was killed takes seconds to come back.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from unmaskrl.tasks.math.answers import is_balanced
from unmaskrl.tasks.math.latex import (
    MAX_ITEMS,
    Form,
    Item,
    as_latex,
    group_of,
    has_relation,
    interval_of,
    items_of,
    normal_form,
)
from unmaskrl.tasks.math.latex_numbers import based_number, exact_value
from unmaskrl.tasks.math.units import UNITS, words_of
from unmaskrl.tasks.sandbox.guard import Guard

ALGEBRA = Guard("unmaskrl.tasks.math.equivalence_worker:verify_latex", seconds=3.0)
MAX_CHARACTERS = 150
MAX_DEPTH = 6
MAX_TEXT = 2000
MAX_QUESTIONS = 12
_MISSING = "the task math needs math-verify to compare answers: pip install 'unmaskrl[tasks]'"

# What takes seconds to hours, as measured: sums, limits and integrals are evaluated, products and
# powers of brackets are expanded, unions and bars are tried against each other, powers of powers
# and long numbers explode.
_WILD = re.compile(
    r"\\(?:sum|prod|[io]*int|lim|[dt]?binom)|[0-9]{16}|\^(?:\{[^{}]*\^|\{?-?[0-9]{4}|[0-9a-zA-Z]\^)"
    r"|[0-9]{3}!|[!)}\]]!"
    r"|[)}\]]\^\{?-?[0-9]{2}|(?:\)[^()]*\(.*){4}|(?:\\cup.*){4}|(?:\|.*){7}|(?:\^.*){9}"
)
_JOINED = re.compile(r"[0-9.] [0-9.]")
_SUBSCRIPT = re.compile(r"[0-9)}\]|] ?_")
# A prime stands after a letter (f').
_UNREAD = re.compile(
    "[^A-Za-z0-9+*/^_(){}\\[\\]|!.,:<>=\\\\ &'\u2264\u2265\u2248\u2208\u222a-]|(?<![A-Za-z'])'"
)
_LETTER = re.compile(r"\\[A-Za-z]+|([A-Za-z])")
_PLUS_MINUS = re.compile(r"\\pm ?")


@lru_cache(maxsize=4096)
def equivalent(gold: str, answer: str, words: frozenset[str] = frozenset()) -> bool:
    """Whether ``answer`` (model-written) means ``gold``; ``words`` (of the problem) may be its
    unit.

    Raises ValueError if math-verify is needed and missing.
    """
    if len(answer) > MAX_TEXT or not is_balanced(answer):
        return False
    wanted = normal_form(gold)
    own = words_of(gold) if wanted.unit else frozenset()
    got = normal_form(answer, UNITS | own | {word for word in words if len(word) > 2}, UNITS | own)
    if not got.text or not wanted.text:
        return False
    if wanted.unit and got.unit and wanted.unit != got.unit:
        return False
    if wanted.text.replace(", ", ",") == got.text.replace(", ", ","):
        return True
    return _Comparison(exact_text=wanted.wordy or got.wordy).same(wanted, got)


@dataclass
class _Comparison:
    """One comparison of two answers; ``questions`` counts what math-verify was asked."""

    exact_text: bool
    questions: int = 0
    timeouts: int = field(default_factory=lambda: ALGEBRA.timeouts + ALGEBRA.crashes)

    def same(self, wanted: Form, got: Form) -> bool:
        """Whether two normal forms mean the same."""
        gold = _items(wanted.text)
        answer = _items(got.text)
        as_list = len(gold) > 1 and len(answer) == 1
        if as_list:
            # The gold answer says what a comma is: 2,100 may be two numbers.
            answer = items_of(got.text)
        gold, answer = _both_signs(gold, answer)
        if len(gold) == len(answer) == 1:
            return self._same_item(gold[0], answer[0])
        if len(gold) == 1 or len(answer) == 1:
            return self._set_and_list(gold, answer)
        names = [{item.name for item in side} - {""} for side in (gold, answer)]
        if len(names[0]) == 1 and names[1] and names[1] != names[0]:
            return False
        return self._same_items(_named_alike(gold), _named_alike(answer))

    def _set_and_list(self, gold: list[Item], answer: list[Item]) -> bool:
        """Whether a set in braces and a list have the same members."""
        if len(gold) == 1:
            one = gold[0]
            many = answer
        else:
            one = answer[0]
            many = gold
        group = group_of(one.values[-1]) if len(one.values) == 1 else None
        if group is None or group.ordered or group.kind == "union":
            return False
        members = [Item("", (part,), False) for part in group.parts]
        many = _named_alike(many)
        bare = (
            [Item("", item.values, item.about) for item in many]
            if len({item.name for item in many}) == 1
            else many
        )
        return (
            self._same_items(members, bare) if one is gold[0] else self._same_items(bare, members)
        )

    def _same_items(self, gold: list[Item], answer: list[Item]) -> bool:
        """Whether two lists have the same members, each as often; in the same order where names
        tell one from another.
        """
        if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
            return False
        names = [{item.name for item in side} for side in (gold, answer)]
        if any(len(own) > 1 for own in names) and names[0] != names[1]:
            return all(self._same_item(*pair) for pair in zip(gold, answer, strict=True))
        return self._matched(gold, answer, self._same_item)

    def _matched(self, gold: list, answer: list, same) -> bool:  # pyright: ignore
        """Whether each member of one list has a partner of its own in the other."""
        left = list(answer)
        for one in gold:
            partner = next((place for place, other in enumerate(left) if same(one, other)), None)
            if partner is None:
                return False
            left.pop(partner)
        return not left

    def _same_item(self, gold: Item, answer: Item) -> bool:
        """Whether an item says the value of another; names must agree where both have one."""
        if gold.name and answer.name and gold.name != answer.name:
            return self._same_equation(gold, answer)
        if len(gold.values) == len(answer.values) == 1:
            return self._same_value(gold.values[0], answer.values[0])
        if _has_letters("".join(gold.values)):
            return self._same_equation(gold, answer)
        if answer.about:
            return _rounds(answer.values) and any(
                self._same_value(g, a) for g in gold.values for a in answer.values
            )
        return all(any(self._same_value(g, a) for g in gold.values) for a in answer.values)

    def _same_equation(self, gold: Item, answer: Item) -> bool:
        """Whether two equations in letters are the same one (``y=2x`` and ``2x-y=0``)."""
        sides = [
            [item.name, *item.values] if item.name else [*item.values] for item in (gold, answer)
        ]
        if any(
            len(own) != 2 or item.about for own, item in zip(sides, (gold, answer), strict=True)
        ):
            return False
        if any(item.name and not _has_letters(item.values[0]) for item in (gold, answer)):
            # x=5 is a value and no equation to be turned round.
            return sides[0] == sides[1]
        return self._asked("=".join(sides[0]), "=".join(sides[1]))

    def _same_value(self, gold: str, answer: str) -> bool:
        """Whether two values without ``=`` mean the same."""
        if gold == answer:
            return True
        if has_relation(gold) != has_relation(answer):
            gold = interval_of(gold)
            answer = interval_of(answer)
        numbers = exact_value(gold), exact_value(answer)
        if None not in numbers:
            return numbers[0] == numbers[1]
        groups = group_of(gold), group_of(answer)
        if groups[0] is not None and groups[1] is not None:
            return self._same_parts(groups[0], groups[1])
        if groups[0] is not None or groups[1] is not None:
            return False
        bases = based_number(gold), based_number(answer)
        if bases[0] or bases[1]:
            return _same_base(gold, answer)
        return self._asked(gold, answer)

    def _same_parts(self, gold, answer) -> bool:  # pyright: ignore
        if (
            gold.kind != answer.kind
            or len(gold.parts) != len(answer.parts)
            or len(gold.parts) > MAX_ITEMS
        ):
            return False
        if gold.ordered:
            return all(
                self._same_value(*pair) for pair in zip(gold.parts, answer.parts, strict=True)
            )
        return self._matched(list(gold.parts), list(answer.parts), self._same_value)

    def _asked(self, gold: str, answer: str) -> bool:
        """math-verify's verdict on two single expressions; False for what it may not see, and after
        a worker's death.
        """
        if (
            self.exact_text
            or self.questions >= MAX_QUESTIONS
            or self.timeouts != ALGEBRA.timeouts + ALGEBRA.crashes
        ):
            return False
        if has_relation(gold) != has_relation(answer) or not (
            _is_readable(gold) and _is_readable(answer)
        ):
            return False
        # It reads X as x, and a letter that is missing as nothing.
        if set(_LETTER.findall(gold)) != set(_LETTER.findall(answer)):
            return False
        wanted = as_latex(gold)
        got = as_latex(answer)
        if len(wanted) > MAX_CHARACTERS or not _is_tame(got):
            return False
        self.questions += 1
        return verify_latex(wanted, got)


def _items(text: str) -> list[Item]:
    """The items of a list; a number with commas by thousands is one."""
    return [Item("", (text,), False)] if exact_value(text) is not None else items_of(text)


def _both_signs(gold: list[Item], answer: list[Item]) -> tuple[list[Item], list[Item]]:
    r"""Lists whose ``a \pm b`` are written out, where that makes their lengths agree."""
    if len(gold) == len(answer):
        return gold, answer
    return [i for item in gold for i in _signs(item)], [i for item in answer for i in _signs(item)]


def _signs(item: Item) -> list[Item]:
    value = item.values[0]
    if len(item.values) > 1 or "\\mp" in value or len(_PLUS_MINUS.findall(value)) != 1:
        return [item]
    start = value.startswith("\\pm")
    return [
        Item(item.name, (_PLUS_MINUS.sub(sign, value),), item.about)
        for sign in ("" if start else "+", "-")
    ]


def _named_alike(items: list[Item]) -> list[Item]:
    """``x=1,-2`` as ``x=1,x=-2``; and without the name that all of them share."""
    names = {item.name for item in items}
    if len(names - {""}) == 1 and (len(names) == 1 or items[0].name):
        return [Item("", item.values, item.about) for item in items]
    return items


def _rounds(values: tuple[str, ...]) -> bool:
    """Whether the values after the first are the first one's decimals, rounded where they end."""
    exact = exact_value(values[0])
    for value in values[1:]:
        if exact is None or re.fullmatch(r"-?[0-9]*\.?[0-9]+", value) is None:
            return False
        places = len(value.partition(".")[2])
        if abs(Fraction(value) - exact) > Fraction(1, 2 * 10**places):
            return False
    return True


def _same_base(gold: str, answer: str) -> bool:
    """``2516_8`` as ``2516_{8}`` and, where the problem asks for a base, as ``2516``; another base
    is another number.
    """
    wanted = based_number(gold)
    got = based_number(answer)
    if wanted and got:
        return wanted == got
    if wanted:
        return wanted[0] == answer.upper()
    return got is not None and got[1] == 10 and got[0] == gold


def _has_letters(text: str) -> bool:
    return re.search(r"(?<![\\A-Za-z])[A-Za-z]", text) is not None


def _is_readable(text: str) -> bool:
    """Whether a computer algebra system reads all of a text: it joins digits over blanks, drops
    bases and unknown signs.
    """
    return all(pattern.search(text) is None for pattern in (_JOINED, _SUBSCRIPT, _UNREAD))


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
