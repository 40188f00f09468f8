"""The published protocol of countdown and sudoku: prompts, rewards and parsers of d1 (arXiv
2504.12216), quirks included.

For comparison with published numbers only; docs/tasks.md lists every quirk. Prompts are those of
dllm-reasoning/d1 (diffu-grpo/data_utils.py, eval/countdown.py, eval/sudoku.py; the 3-shot sudoku
texts: facebookresearch/SPG, same files). The parsers (d1 diffu-grpo/reward_func.py,
eval/parse_and_get_acc.py, eval/parser_helper.py) are written anew: linear time on any text, and
arithmetic without eval.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from unmaskrl.tasks.base import CLOSE_TAG, OPEN_TAG, Example, answer_spans
from unmaskrl.tasks.d1.d1_arithmetic import python_value

FORMAT_SCORE = 0.1
TOLERANCE = 1e-5
CELLS = 16
PREFILL = "<reasoning>"
# int() refuses longer texts in Python 3.11, and then so does the published code.
_MAX_DIGITS = 4300

_FORMAT = (
    "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
)
_COUNTDOWN_TRAIN = (
    "{format}\nUsing only the numbers {numbers}, create an arithmetic expression that evaluates to "
    "exactly {target}. You "
    "must use all numbers from the list, and each number must be used exactly once. You may use "
    "the operations +, -, *, "
    "and / as needed. After reasoning, provide only your final expression inside <answer></answer> "
    "tags without "
    "including an equals sign or the target number. For example, if the numbers are [2, 3, 4] and "
    "the target is 5, a "
    "valid answer is: <answer>\n2*4-3\n</answer>"
)
_COUNTDOWN_EVAL = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly "
    "the provided target "
    "number. You may use the operations +, -, *, and / as needed, but each number must be used "
    "exactly once. Think "
    "step-by-step. After reasoning, provide only your final expression inside \\boxed{{}} tags "
    "without including an "
    "equals sign or the target number. For example: \\boxed{{a + b * c}}Respond in the following "
    "format:\n<reasoning>\nYour reasoning "
    "here\n</reasoning>\n<answer>\n\\boxed{{...}}\n</answer>\n\nNumbers: "
    "{numbers}\nTarget: {target}"
)
_SUDOKU = (
    "\nPlease solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character "
    "string reading "
    "left-to-right, top-to-bottom, where '0' represents empty cells.\n\nRules:\n- Fill empty cells "
    "with digits 1-4\n- "
    "Each row must contain digits 1-4 exactly once\n- Each column must contain digits 1-4 exactly "
    "once\n- Each 2x2 box "
    "must contain digits 1-4 exactly once\n\nImportant: Your solution must be a COMPLETE "
    "16-character string with only "
    "the digits 1-4, representing your final solved grid.\n\nRespond in this exact "
    "format:\n<reasoning>\nYour "
    "step-by-step solving process\n</reasoning>\n<answer>\n[16-character solution string with no "
    "spaces or "
    "separators]\n</answer>\n"
)
_SHOT = (
    "Question:\nSolve the following Sudoku puzzle: {puzzle}\nAnswer:\n<reasoning>\nInterpret "
    "puzzle as 4 rows of "
    "4:\n{start}\n\nFill easy singles:\n{steps}\n\nFinal "
    "grid:\n{end}\n</reasoning>\n<answer>\n{solution}\n</answer>"
)
_SHOTS = (
    (
        "3014002020004130",
        "3214142323414132",
        "R1 missing 2 \u2192 R1C2=2.\nR4 missing 2 \u2192 R4C4=2.\nBox D (R3-4,C3-4) then needs "
        "{1,4}; column4 can only "
        "accept 1 \u2192 R3C4=1, R3C3=4.\nR3 now missing 3 \u2192 R3C2=3.\nColumn1 missing 1 "
        "\u2192 R2C1=1.\nColumn2 "
        "missing 4 \u2192 R2C2=4.\nLast cell R2C4=3.",
    ),
    (
        "0000100420013142",
        "4213132424313142",
        "Col1 missing 4 \u2192 R1C1=4.\nCol4 missing 3 \u2192 R1C4=3.\nBox A (R1-2,C1-2) missing "
        "{2,3} and R1 now needs "
        "{1,2} \u2192 R1C2=2, R2C2=3.\nR1C3=1.\nR2 now missing 2 \u2192 R2C3=2.\nCol2 missing 4 "
        "\u2192 R3C2=4, then "
        "R3C3=3.",
    ),
    (
        "2001403002001420",
        "2341413232141423",
        "R1 missing {3,4}; Col2 can't be 1 so R1C2=3 \u2192 R1C3=4.\nR4 missing 3 \u2192 "
        "R4C4=3.\nCol4 missing {2,4}; R2 "
        "must take 2 \u2192 R2C4=2 \u2192 R2C2=1.\nCol1 missing 3 \u2192 R3C1=3.\nCol3 missing 1 "
        "\u2192 R3C3=1 \u2192 "
        "R3C4=4.",
    ),
)

_DIGITS = re.compile(r"\d+")
_PLAIN = re.compile(r"[\d+\-*/().\s]+")
# Possessive and tried only where a run starts, so that no run is read twice.
_EQUATION = re.compile(r"(?<![0-9+\-*/() ])([0-9+\-*/() ]++)=[0-9. ]")
_BRACE = re.compile(r"[{}]")
_END = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")
_END_OF_TEXT = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
_FENCED = re.compile(r"```([\d\s]++)```")
_SIXTEEN_CLOSED = re.compile(r"(\d{16})\s*+</answer>")
_SIXTEEN = re.compile(r"\b(\d{16})\b")


def countdown_prompt(numbers: Sequence[int], target: int, training: bool) -> list[dict[str, str]]:
    """The chat of training, or of evaluation (another text, a box, and an answer that starts with
    ``<reasoning>``).
    """
    template = _COUNTDOWN_TRAIN if training else _COUNTDOWN_EVAL
    return _chat(template.format(format=_FORMAT, numbers=list(numbers), target=target), training)


def sudoku_prompt(puzzle: str, few_shot: int, training: bool) -> list[dict[str, str]]:
    """Rules, 0..3 worked examples, the puzzle; the texts of training and evaluation differ by a
    line end.
    """
    question = f"Solve the following Sudoku puzzle: {puzzle}\n"
    if few_shot:
        shots = "\n\n".join(_shot(*shot) for shot in _SHOTS[:few_shot])
        # The evaluation's question brings its own line end.
        question = f"{shots}\n\nQuestion: {question}{'' if training else chr(10)}Answer:\n"
    return _chat(f"{_SUDOKU}\n\n{question}", training)


def _chat(content: str, training: bool) -> list[dict[str, str]]:
    start = [] if training else [{"role": "assistant", "content": PREFILL}]
    return [{"role": "user", "content": content}, *start]


def _shot(puzzle: str, solution: str, steps: str) -> str:
    start, end = (
        "\n".join(f"R{row + 1}: {' '.join(grid[4 * row : 4 * row + 4])}" for row in range(4))
        for grid in (puzzle, solution)
    )
    return _SHOT.format(puzzle=puzzle, start=start, steps=steps, end=end, solution=solution)


def with_split(example: Example, split: str) -> Example:
    """The example with its split among the fields, which chooses the prompt."""
    return Example(id=example.id, fields={**example.fields, "split": split})


def trains(example: Example) -> bool:
    """Whether an example is for training (also one that nobody put into a split)."""
    return example.fields.get("split", "train") == "train"


def layout(reasoning: str, answer: str) -> str:
    """A completion in the published format."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n{OPEN_TAG}\n{answer}\n{CLOSE_TAG}"


def _last_body(text: str) -> str | None:
    """The last match of ``<answer>(.*?)</answer>`` over several lines, stripped."""
    spans = answer_spans(text)
    return text[slice(*spans[-1])].strip() if spans else None


def countdown_score(text: str, numbers: Sequence[int], target: int) -> float:
    """The training reward: 0 without an answer block, 1 for a value within 1e-5 of the target, else
    0.1.
    """
    body = _last_body(text)
    if body is None:
        return 0.0
    return 1.0 if _reaches(body, numbers, target) else FORMAT_SCORE


def countdown_correct(text: str, numbers: Sequence[int], target: int) -> bool:
    """The evaluation's verdict: on the last box, or without one on the first
    ``expression = number`` of the whole text.
    """
    equation = _boxed(text)
    if equation is None:
        spans = answer_spans(text)
        equation = text[slice(*spans[0])].strip() if spans else text
    for latex, sign in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        equation = equation.replace(latex, sign)
    stated = _EQUATION.search(equation) if "=" in equation else None
    return _reaches(stated[1].strip() if stated else equation, numbers, target)


def _boxed(text: str) -> str | None:
    r"""The inside of the last \boxed or (as it stands) \fbox; the whole text without one; None if
    its braces never close.
    """
    if r"\boxed " in text:
        return text[text.rindex(r"\boxed ") + len(r"\boxed ") :].split("$", 1)[0]
    start = text.rfind(r"\boxed")
    start = text.rfind(r"\fbox") if start < 0 else start
    if start < 0:
        return text
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            box = text[start : match.end()]
            return box[len(r"\boxed{") : -1] if box.startswith(r"\boxed{") else box
    return None


def _reaches(equation: str, numbers: Sequence[int], target: int) -> bool:
    """The digits of the text are the numbers as a multiset, nothing but arithmetic stands in it,
    and the value fits.
    """
    found: list[int] = []
    for match in _DIGITS.finditer(equation):
        if len(found) == len(numbers) or match.end() - match.start() > _MAX_DIGITS:
            return False
        found.append(int(match[0]))
    if sorted(found) != sorted(numbers) or not _PLAIN.fullmatch(equation):
        return False
    value = python_value(equation)
    return value is not None and abs(value - target) < TOLERANCE


def sudoku_training_grid(text: str) -> str | None:
    """The first 16 digit characters of the last answer; None without one, or without digits."""
    body = _last_body(text)
    return None if body is None else "".join(islice(filter(str.isdigit, body), CELLS)) or None


def sudoku_evaluation_grid(text: str) -> str | None:
    """What evaluation reads: the first of five patterns that finds something, without white
    space.
    """
    first = text.find(OPEN_TAG)
    closed = text.find(CLOSE_TAG)
    inside = text[first + len(OPEN_TAG) :] if first >= 0 else ""
    after = text[closed + len(CLOSE_TAG) :] if closed >= 0 else ""
    fenced = _FENCED.search(inside)
    end = _END.search(inside)
    found = fenced[1].strip() if fenced else ""
    found = found or (inside[: end.start()].strip() if end else "")
    found = found or _END_OF_TEXT.split(after.lstrip(), maxsplit=1)[0].strip()
    for pattern in (_SIXTEEN_CLOSED, _SIXTEEN):
        match = None if found else pattern.search(text)
        found = match[1] if match else found
    return "".join(found.split()) or None


def sudoku_cells(grid: str | None, puzzle: str, solution: str) -> tuple[int, int]:
    """(blanks filled right, blanks), for a grid padded with 0 or cut to 16 characters."""
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    filled = (grid or "")[:CELLS].ljust(CELLS, "0")
    return sum(filled[cell] == solution[cell] for cell in blanks), len(blanks)
