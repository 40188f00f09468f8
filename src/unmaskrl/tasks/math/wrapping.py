r"""What people and models put around an answer, taken off: ``\boxed``, ``$``, bold, fences, Unicode
signs, a full stop.

Nothing here changes a value: every rule takes off a pair that encloses the whole text, or one sign
for the same in LaTeX.
"""

from __future__ import annotations

import re

_SIGNS = {
    "\u2212": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": r"\div ",
    "\u00b0": r"^\circ ",
    "\u221e": r"\infty ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2248": r"\approx ",
    "\u00b1": r"\pm ",
    "\u2208": r"\in ",
    "\u222a": r"\cup ",
    "\u2205": r"\emptyset ",
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
    "\u20ac": "$",
    "\u00a3": "$",
}
_TABLE = str.maketrans(_SIGNS)
_SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
_RAISED = re.compile(f"(?<=[A-Za-z)0-9])[{_SUPERSCRIPTS}]+")
_ROOT = re.compile("\u221a([0-9]+|[A-Za-z](?![A-Za-z]))")
_FENCE = re.compile(r"```[A-Za-z]*[ \t\r\n]+([^`]*)```")
_PAIRS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\[", "\\]"),
    ("\\(", "\\)"),
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("`", "`"),
)
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t\r\n]*(?=\{)")
# TeX boxes one token; whoever leaves the braces out means the next word.
_LOOSE_BOX = re.compile(r"\\boxed[ \t]+(?!\{)([^ \t\r\n$]+)")
_BRACES = re.compile(r"\\[\\{}]|([{}])")
_TAILS = ("\\,", "\\;", "\\ ", ".", ",", ";")
_ROUNDS = 12


def plain_signs(text: str) -> str:
    r"""Unicode signs of mathematics as LaTeX: minus, times, degrees, infinity, roots, powers.
    Digits stay as they are.
    """
    if text.isascii():
        return text
    text = _RAISED.sub(
        lambda run: f"^{{{''.join(str(_SUPERSCRIPTS.index(sign)) for sign in run[0])}}}", text
    )
    return _ROOT.sub(r"\\sqrt{\1}", text).translate(_TABLE)


def unwrap(text: str) -> str:
    """The text inside everything that encloses it whole, without blanks at its ends and punctuation
    after it.
    """
    for _ in range(_ROUNDS):
        inner = _opened(text.strip(" \t\r\n"))
        if inner == text:
            break
        text = inner
    return text


def _opened(text: str) -> str:
    """One wrapping less; the same text if there is none."""
    for tail in _TAILS:
        if text.endswith(tail) and not text.endswith("\\" + tail):
            return text.removesuffix(tail)
    fence = _FENCE.fullmatch(text)
    if fence is not None:
        return fence[1]
    for start, end in _PAIRS:
        inner = text[len(start) : len(text) - len(end)]
        encloses = text.startswith(start) and text.endswith(end) and len(text) > len(start + end)
        if encloses and start not in inner and end not in inner and not inner.endswith("\\"):
            return inner
    box = _BOX.match(text)
    start = box.end() if box else 0
    if text.startswith("{", start) and closing_brace(text, start) == len(text) - 1:
        return text[start + 1 : -1]
    loose = _LOOSE_BOX.fullmatch(text)
    return loose[1] if loose else text


def closing_brace(text: str, start: int) -> int:
    """Where the brace at ``start`` is closed; -1 if it is not. Escaped braces count for nothing."""
    depth = 0
    for match in _BRACES.finditer(text, start):
        depth += (match[1] == "{") - (match[1] == "}")
        if depth == 0:
            return match.start()
    return -1


_ARITHMETIC = (
    ("\\left", ""),
    ("\\right", ""),
    ("\\times", "*"),
    ("\\cdot", "*"),
    ("\\div", "/"),
    ("\\,", " "),
    ("\\;", " "),
    ("\\!", " "),
    ("{", "("),
    ("}", ")"),
)
_FRACTION = re.compile(r"\\[dt]?frac[ ]*\{([^{}]*)\}[ ]*\{([^{}]*)\}")


def plain_arithmetic(text: str) -> str:
    r"""LaTeX arithmetic with the signs ``+ - * / ( )``: ``\times``, ``\cdot``, ``\div``,
    ``\frac{a}{b}``, ``\left(``.
    """
    text = _FRACTION.sub(r"((\1)/(\2))", unwrap(plain_signs(text)))
    for old, new in _ARITHMETIC:
        text = text.replace(old, new)
    return text.strip(" \t\r\n")


# What may stand between the cells of a grid: rules, commas, brackets, dashes; no digit and no
# letter.
_RULES = re.compile(r"(?:\\\\|\\hline|[ \t\r\n|,;&()\[\]{}+=_-])+")


def grid_digits(text: str) -> str:
    """The cells of a grid without what separates them; other characters stay, so that they can be
    refused.
    """
    return _RULES.sub("", unwrap(text))
