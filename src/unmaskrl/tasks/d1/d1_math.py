r"""The published protocol of gsm8k and math: prompts, rewards and parsers of d1 (arXiv 2504.12216),
quirks included.

For comparison with published numbers only; docs/tasks.md lists every quirk. Prompts are those of
dllm-reasoning/d1 (diffu-grpo/data_utils.py, eval/gsm8k.py, eval/math500.py), which
facebookresearch/SPG and the STP authors keep. The parsers are written anew: linear time on any
text, apart from one regular expression, which is not tried beyond MAX_CHARACTERS.
"""

from __future__ import annotations

import re

from unmaskrl.tasks.base import Example

MAX_CHARACTERS = 8192

TRAIN_SYSTEM = (
    "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
)
TRAIN_MATH = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. "
    "Wrap the final answer in a \\boxed{}. \n\n"
)
_EVAL_FORMAT = (
    "Respond in the following format:\n<reasoning>\nYour reasoning "
    "here\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
)
_EVAL_TASK = "You are a math expert. You will be given a question to solve. Solve it step by step. "
EVAL_GSM8K = f"{_EVAL_TASK}Wrap the final answer in a \\boxed{{}}. \n{_EVAL_FORMAT}"
# The quotation mark is in the published string.
EVAL_MATH = f'{_EVAL_TASK}Wrap the final answer in a \\boxed{{}}.\n{_EVAL_FORMAT}" \n'
PREFILL = "<reasoning>"

_GOLD = re.compile(r"####\s*\$?([\d,]+(?:\.\d+)?)")
_NUMBER = re.compile(r"-?\d+\.?\d*")
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")
_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
_BACKSPACE_BOX = "\boxed"  # sic: what the published test for a box looks for


def published_prompt(example: Example, problem: str, task: str) -> list[dict[str, str]]:
    """The chat of training for training problems, that of evaluation for the others."""
    trains = example.fields.get("split", "train") == "train"
    return train_prompt(problem, task) if trains else eval_prompt(problem, task)


def train_prompt(problem: str, task: str) -> list[dict[str, str]]:
    """The chat of training: format, then (math) the expert line, then the problem."""
    return [
        {
            "role": "user",
            "content": f"{TRAIN_SYSTEM}\n\n{TRAIN_MATH if task == 'math' else ''}{problem}",
        }
    ]


def eval_prompt(problem: str, task: str) -> list[dict[str, str]]:
    """The chat of evaluation: another format text, and an answer that starts with
    ``<reasoning>``.
    """
    content = f"{EVAL_MATH if task == 'math' else EVAL_GSM8K}\n\n{problem}"
    return [{"role": "user", "content": content}, {"role": "assistant", "content": PREFILL}]


def tagged(text: str) -> str:
    """What stands between the last opening tag and the next closing one; the whole text without
    tags.
    """
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def xml_count(text: str) -> float:
    """1/8 for each of four tags that occurs once with its line ends; 1/1000 off per character after
    the answer, twice.
    """
    score = 0.125 * (text.count("<reasoning>\n") == 1) + 0.125 * (
        text.count("\n</reasoning>\n") == 1
    )
    if text.count("\n<answer>\n") == 1:
        score += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        score += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return score


def soft_format(text: str) -> float:
    """1/2 for reasoning and answer tags in order; ``.`` stops at line ends, so each pair has to
    stand on one line.
    """
    return 0.5 if len(text) <= MAX_CHARACTERS and _SOFT.match(text) else 0.0


def strict_format(text: str) -> float:
    """1/2 for the canonical layout with exactly one line of reasoning and one of answer."""
    return 0.5 if _STRICT.match(text) else 0.0


def gsm8k_gold(answer: str) -> float | None:
    """The number after ``####`` as evaluation reads it; None for a negative one, which is then
    never right.
    """
    match = _GOLD.search(answer)
    return None if match is None or not match[1].strip(",") else float(match[1].replace(",", ""))


def gsm8k_answer(text: str) -> float | None:
    """The answer as evaluation reads it: the first box with a number in it, else the last number of
    the first answer block.
    """
    for body in map(str.strip, _flat_boxes(text)):
        if body.strip("."):
            value = _float(body, last=False)
            if value is not None:
                return value
    body = _first_answer(text)
    return _float(body, last=True) if body else None


def _float(body: str, last: bool) -> float | None:
    try:
        return float(body)
    except ValueError:
        numbers = _NUMBER.findall(body)
        return float(numbers[-1 if last else 0]) if numbers else None


def _flat_boxes(text: str) -> list[str]:
    r"""Insides of ``\boxed{`` up to the next ``}`` on the same line, whatever braces are
    between.
    """
    bodies = []
    position = text.find("\\boxed{")
    close = -1
    line_end = -1
    while position >= 0:
        start = position + len("\\boxed{")
        if close < start and (close := text.find("}", start)) < 0:
            break
        if line_end < start:
            found = text.find("\n", start)
            line_end = len(text) if found < 0 else found
        whole = close < line_end
        if whole:
            bodies.append(text[start:close])
        position = text.find("\\boxed{", close + 1 if whole else start)
    return bodies


def _first_answer(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    return text[start + len("<answer>") : end].strip() if end >= 0 else None


def math_correct_for_training(gold: str, text: str) -> bool:
    """The reward's judge: last box (the whole text if there is none or it never closes), by string
    normalisation.
    """
    box = _last_box(text)
    return same_string(text if box is None else _unbox(box), gold)


def math_correct_for_evaluation(gold: str, text: str) -> bool:
    """Evaluation's judge: last box (the whole text if there is none); the answer block only if the
    box is empty or open.
    """
    box = _last_box(text)
    answer = (None if box is None else _unbox(box)) or _first_answer(text)
    return answer is not None and same_string(answer, gold)


def math_format(text: str) -> float:
    r"""3/4 with an answer tag, 1/4 without: the test for a box compares with a backspace and
    ``oxed``.
    """
    parts = text.split("<answer>")
    body = parts[1].split("</answer>")[0] if len(parts) > 1 else text
    return 0.5 * ((len(parts) > 1) + (1.0 if _BACKSPACE_BOX in body else 0.5))


def _last_box(text: str) -> str | None:
    r"""The last ``\boxed{...}`` or ``\fbox{...}``, braces counted; None if it never closes; the
    text if there is none.
    """
    if "\\boxed " in text:
        return "\\boxed " + text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return text
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : start + match.end()]
    return None


def _unbox(box: str) -> str:
    if box.startswith("\\boxed "):
        return box.removeprefix("\\boxed ")
    return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") and box.endswith("}") else box


def same_string(answer: str, gold: str) -> bool:
    """Equality of normalised strings (the rules of the MATH data set); of the raw ones where
    normalising fails.
    """
    try:
        return _normalise(answer) == _normalise(gold)
    except (ValueError, IndexError):
        return answer == gold


def _normalise(text: str) -> str:
    for old, new in (
        ("\n", ""),
        ("\\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        ("\\left", ""),
    ):
        text = text.replace(old, new)
    for old in ("\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(old, "")
    if "\\text{ " in text:  # a unit
        text, _ = text.split("\\text{ ")
    for old, new in (("\\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    head, *rest = text.split("\\sqrt")
    text = head + "".join(
        "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest
    )
    text = _full_fractions(text.replace(" ", ""))
    return _slash_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _full_fractions(text: str) -> str:
    head, *rest = text.split("\\frac")
    for part in rest:
        if part[0] != "{" and len(part) < 2:
            return text
        if part[0] == "{":
            head += "\\frac" + part
        else:
            below = part[1] if part[1] == "{" else f"{{{part[1]}}}"
            head += f"\\frac{{{part[0]}}}{below}{part[2:]}"
    return head


def _slash_fraction(text: str) -> str:
    if text.count("/") != 1:
        return text
    # anything but two integers fails: raw strings are compared
    above, below = map(int, text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
