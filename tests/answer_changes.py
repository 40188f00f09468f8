r"""Changes of LaTeX answers for tests of the judges: one-place mutations that change the meaning,
rewritings that do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "answers"
COMMAND = re.compile(r"\\[A-Za-z]+|\\.")


def golds() -> list[str]:
    """Answers of the kinds that competition problems have, written for these tests."""
    return [
        line for line in (FOLDER / "golds.txt").read_text(encoding="utf-8").splitlines() if line
    ]


def places(text: str) -> list[bool]:
    r"""For each character whether it stands outside commands such as ``\frac`` and names such as
    ``{pmatrix}``.
    """
    free = [True] * len(text)
    for match in re.finditer(
        r"\\(?:begin|end)\{[a-z]+\}|\\(?:text|mbox)\{[^{}]*\}|\\[A-Za-z]+|\\.", text
    ):
        free[match.start() : match.end()] = [False] * len(match[0])
    return free


def replaced(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def digits(text: str) -> Iterator[str]:
    """Every digit by three others, removed, and doubled."""
    for place, character in enumerate(text):
        if character.isdigit():
            for step in (1, 3, 7):
                yield replaced(text, place, place + 1, str((int(character) + step) % 10))
            if text[place : place + 2] != "0.":  # .5 is 0.5
                yield replaced(text, place, place + 1, "")
            yield replaced(text, place, place + 1, character + "4")


def joins(text: str) -> Iterator[str]:
    """Two digits with something between them that must not be read over."""
    for place in range(1, len(text)):
        if text[place - 1].isdigit() and text[place].isdigit():
            for new in (
                " ",
                "$",
                "\\%",
                "{}",
                "\\text{}",
                "^\\circ ",
                "\\;",
                "~",
                "\\left",
                "\\(",
                "\n",
                "'",
                "**",
            ):
                yield text[:place] + new + text[place:]


def signs(text: str) -> Iterator[str]:
    """A plus for a minus and the reverse, a sign removed, a minus in front."""
    for place, character in enumerate(text):
        if character in "+-":
            yield replaced(text, place, place + 1, "-" if character == "+" else "+")
            yield replaced(text, place, place + 1, "")
    yield f"-{text}"
    yield f"-({text})"


def brackets(text: str) -> Iterator[str]:
    """Round for square and the reverse; a bracket removed."""
    free = places(text)
    for place, character in enumerate(text):
        if free[place] and character in "()[]":
            yield replaced(
                text, place, place + 1, dict(zip("()[]", "[]()", strict=True))[character]
            )
            yield replaced(text, place, place + 1, "")


def letters(text: str) -> Iterator[str]:
    """Every variable by another one, and by its capital."""
    free = places(text)
    for place, character in enumerate(text):
        if free[place] and character.isalpha() and character.isascii():
            for new in ("w", character.swapcase(), "2"):
                if new != character and not re.search("[0-9]_", text):  # digits of a base
                    yield replaced(text, place, place + 1, new)


def functions(text: str) -> Iterator[str]:
    """Another function, constant or relation; a root or a power removed."""
    pairs = {
        "\\sqrt": ("", "\\sqrt[3]", "\\ln"),
        "\\pi": ("", "e", "3", "\\pi^2", "2\\pi"),
        "\\sin": ("\\cos",),
        "\\cos": ("\\sin",),
        "\\tan": ("\\cot",),
        "\\ln": ("", "\\log_2"),
        "\\infty": ("9",),
        "\\le ": ("<", "\\ge "),
        "\\leq ": ("<", ">"),
        "<": ("\\le ", ">"),
        ">": ("\\ge ", "<"),
        "\\cup": ("\\cap",),
        "\\pm": ("+", "-"),
        "\\cdot": ("+",),
        "\\times": ("-",),
        "=": ("<",),
        "^": ("", "_"),
        "!": ("",),
        "|": ("",),
    }
    for old, news in pairs.items():
        for match in re.finditer(re.escape(old), text):
            for new in news:
                yield replaced(text, match.start(), match.end(), new)


def members(text: str) -> Iterator[str]:
    """A member of a list dropped, doubled or added; hedges, scales and a second answer behind."""
    parts = text.split(",")
    if len(parts) > 1:
        for place in range(len(parts)):
            yield ",".join(parts[:place] + parts[place + 1 :])
            yield ",".join([*parts[: place + 1], *parts[place:]])
    yield f"{text}, 77"
    yield f"77, {text}"
    for tail in (
        " or 77",
        " million",
        " dozen",
        " is wrong",
        " (or 77)",
        " and 77",
        " or more",
        " hundred",
    ):
        yield f"{text}\\text{{{tail}}}"
    for tail in (
        "\\text{ thousand}^2",
        " or 77",
        " = 77",
        " \\approx 78",
        " 5",
        "\\;3",
        "~2",
        "_9",
        "_{14}",
        "+1",
        "\\cdot 2",
    ):
        yield f"{text}{tail}"
    yield f"77 = {text}"


def words(text: str) -> Iterator[str]:
    """Letters of a word changed, swapped or removed."""
    for match in re.finditer(r"\\text\{([^{}]*)\}", text):
        word = match[1].strip()
        if text == match[0]:
            for new in (
                word[::-1],
                word[1:],
                word[:-1],
                "not " + word,
                word + " or odd",
                word[:1] + "x" + word[2:],
            ):
                if new.strip() != word:
                    yield f"\\text{{{new}}}"


KINDS = {
    f.__name__: f for f in (digits, joins, signs, brackets, letters, functions, members, words)
}


def mutations(text: str) -> Iterator[tuple[str, str]]:
    """(kind, changed answer) for each change of one place."""
    for kind, change in KINDS.items():
        seen = {text}
        for changed in change(text):
            if changed not in seen:
                seen.add(changed)
                yield kind, changed


def rewritings(gold: str) -> dict[str, str]:
    """Harmless ways to write an answer, by name."""
    unicode = gold.replace("-", "\u2212").replace("\\times", "\u00d7").replace("\\infty", "\u221e")
    result = {
        "itself": gold,
        "dollars": f"${gold}$",
        "display": f"\\[{gold}\\]",
        "inline": f"\\({gold}\\)",
        "bold": f"**{gold}**",
        "code": f"`{gold}`",
        "fence": f"```\n{gold}\n```",
        "braces": f"{{{gold}}}",
        "box": f"\\boxed{{{gold}}}",
        "frame": f"\\fbox{{{gold}}}",
        "dollars and box": f"$\\boxed{{{gold}}}$",
        "full stop": f"{gold}.",
        "comma": f"{gold},",
        "full stop and dollars": f"${gold}.$",
        "blanks": f"  {gold} \n",
        "display style": f"\\displaystyle {gold}",
        "Unicode": unicode,
        "about": f"\\approx {gold}",
        "equals": f"= {gold}",
        "left": re.sub(
            r"(?<!\\)[(\[]",
            lambda m: f"\\left{m[0]}",
            re.sub(r"(?<!\\)[)\]]", lambda m: f"\\right{m[0]}", gold),
        )
        if "\\sqrt[" not in gold and "\\left" not in gold
        else gold,
        "dfrac": gold.replace("\\frac", "\\dfrac"),
        "tfrac": gold.replace("\\frac", "\\tfrac"),
        "thin spaces": gold.replace(",", ",\\,")
        if not re.search("[0-9],[0-9]{3}|\\{,", gold)
        else gold,
    }
    if not re.search(r"[=<>]|\\le|\\text\{ ?[A-Za-z()]+\}$", gold):
        for name in (
            "x",
            "AB",
            "\\theta",
            "f(x)",
            "x_1",
            "\\angle A",
            "n",
            "P(A)",
            "S_n",
            "\\text{Area}",
        ):
            result[f"{name} ="] = f"{name} = {gold}"
    if re.fullmatch(r"[-0-9,.\\frac{}]+", gold) and "text" not in gold:
        result["units"] = f"{gold} \\text{{ units}}"
        result["plus"] = gold if gold.startswith("-") else f"+{gold}"
    return result
