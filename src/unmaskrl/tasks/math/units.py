"""Words after a number: which are units, and which change what the number says (a scale, a second
answer, a doubt).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Words that change the value of the number before them; no unit is guessed around them.
SCALES = frozenset(
    "hundred thousand million billion trillion hundreds thousands millions billions trillions "
    "dozen dozens score pair pairs "
    "half halves third thirds quarter quarters double twice thrice k m b x times percent "
    "percentage".split()
)
# Words that make another answer, a condition or a doubt of what they follow.
HEDGES = frozenset(
    "or and not no nor neither either both is are was be if else unless when then to through than "
    "more less fewer least "
    "most at over under about around roughly approximately maybe perhaps possibly probably but "
    "except only between plus "
    "minus from without wrong incorrect false undefined nothing none any all other another also "
    "with squared cubed over "
    "one two three four five six seven eight nine ten eleven twelve zero negative base mod modulo "
    "sqrt pi remainder".split()
)
_NAMES = {
    "metre": "m meter meters metre metres",
    "centimetre": "cm centimeter centimeters centimetre centimetres",
    "millimetre": "mm millimeter millimeters millimetre millimetres",
    "kilometre": "km kilometer kilometers kilometre kilometres",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yds yard yards",
    "mile": "mi mile miles",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "gram": "g gram grams",
    "kilogram": "kg kilogram kilograms",
    "pound": "lb lbs pound pounds",
    "ounce": "oz ounce ounces",
    "litre": "l liter liters litre litres",
    "millilitre": "ml milliliter milliliters millilitre millilitres",
    "dollar": "dollar dollars",
    "cent": "cent cents",
    "degree": "degree degrees deg",
    "radian": "radian radians rad",
    "unit": "unit units",
    "square": "square sq",
    "cubic": "cubic cu",
    "mph": "mph",
    "per": "per",
}
_CANONICAL = {word: name for name, words in _NAMES.items() for word in words.split()}
UNITS = frozenset(_CANONICAL)
_WORD = re.compile(r"[A-Za-z]+")
_PHRASE = re.compile(r"[ \t\r\n]*[A-Za-z]+(?:[ \t\r\n/-]+[A-Za-z]+){0,4}[ \t\r\n.]*")


def words_of(text: str) -> frozenset[str]:
    """The words of a text in lower case: the units that an answer to it may name."""
    return frozenset(_WORD.findall(text.lower()))


def known_unit(word: str, words: Iterable[str]) -> bool:
    """Whether a word is one of ``words``, in the singular or the plural, and neither a scale nor a
    hedge.
    """
    if word in SCALES or word in HEDGES:
        return False
    return any(form in words for form in _forms(word))


def _forms(word: str) -> tuple[str, ...]:
    """A word in the singular, the plural and the other spellings of a known unit."""
    singular = word.removesuffix("s")
    spelt: list[str] = [word.removesuffix("es")] if word.endswith("es") else []
    spelt += [word[:-3] + "y"] if word.endswith("ies") else []
    spelt += [word[:-1] + "ies"] if word.endswith("y") else []
    if len(word) > 1 and word in _CANONICAL:
        spelt += [
            other
            for other, name in _CANONICAL.items()
            if name == _CANONICAL[word] and len(other) > 1
        ]
    return (word, singular, word + "s", word + "es", *spelt)


def unit_name(phrase: str, power: str = "") -> tuple[str, ...]:
    """One name for the spellings of a unit: words in the singular, ``square inches`` as ``inch``,
    ``^2``.
    """
    names = [
        _CANONICAL.get(word) or word.removesuffix("s") for word in _WORD.findall(phrase.lower())
    ]
    raised = {"square": "2", "cubic": "3"}
    powers = [raised[name] for name in names if name in raised] + ([power] if power else [])
    return (*(name for name in names if name not in raised), *powers)


def is_unit(phrase: str, allowed: Iterable[str]) -> bool:
    """Whether a phrase is up to five words of ``allowed``, none of which scales or hedges; the
    empty one is not.
    """
    if _PHRASE.fullmatch(phrase) is None:
        return False
    return all(known_unit(word, allowed) for word in _WORD.findall(phrase.lower()))


def could_be_unit(phrase: str) -> bool:
    """Whether a phrase after a gold answer's number may be its unit: plain words, no scale and no
    hedge among them.
    """
    words = _WORD.findall(phrase.lower())
    return _PHRASE.fullmatch(phrase) is not None and not any(
        word in SCALES or word in HEDGES for word in words
    )
