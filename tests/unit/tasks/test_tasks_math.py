"""GSM8K and MATH: what counts as correct, the published protocol with its quirks, and hostile
answers.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.offline_tasks import GSM8K_ROWS, offline_task
from unmaskrl.tasks import GSM8K, Example, MathProblems
from unmaskrl.tasks.base import SPLITS
from unmaskrl.tasks.d1 import d1_math

QUESTION = (
    "Ann has 3 dozen eggs and sells them at 50 cents each. How much does she earn, in dollars?"
)
LAYOUT = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"


def word_problem(answer: str = "36 * 50 = 1800 cents.\n#### 18", split: str = "train") -> Example:
    return Example(id="hand", fields={"question": QUESTION, "answer": answer, "split": split})


def latex_problem(answer: str, split: str = "train") -> Example:
    return Example(
        id="hand", fields={"problem": "Find {x} and so on.", "answer": answer, "split": split}
    )


@pytest.mark.parametrize(
    ("text", "correct", "formatted"),
    [
        ("<answer> 18 </answer>", True, True),
        ("<answer>$18.00</answer>", True, True),
        ("<answer>18 dollars</answer>", True, True),
        ("<answer>18 euros</answer>", False, False),
        ("<answer>3</answer> no: <answer>18</answer>", True, False),
        ("<answer>18</answer><answer>3</answer>", False, False),
        ("<answer>17</answer>", False, True),
        ("<answer>18 or 17</answer>", False, False),
        ("<answer>\\boxed{18}</answer>", True, True),
        ("<answer>\\boxed{17} or \\boxed{18}</answer>", True, True),
        ("<answer>\\boxed{18</answer>", False, False),
        ("<answer></answer>", False, False),
        ("18", False, False),
        ("<answer>" + "1" * 10**6 + "</answer>", False, False),
    ],
)
def test_strict_gsm8k_by_hand(text: str, correct: bool, formatted: bool) -> None:
    task = GSM8K()
    example = word_problem()
    assert task.correct(example, text) is correct
    rewards = task.grade(example, text).parts
    assert rewards == {"correct": float(correct), "format": 0.1 if formatted else 0.0}


@pytest.mark.parametrize(
    ("gold", "text", "correct", "formatted"),
    [
        ("\\frac{1}{2}", "<answer> \\boxed{\\frac12} </answer>", True, True),
        ("\\frac{1}{2}", "<answer>0.5</answer>", True, False),
        ("5", "\\boxed{5}", False, False),
        ("5", "\\boxed{5} <answer>6</answer>", False, False),
        ("5", "<answer>\\boxed{6} so \\boxed{5}</answer>", True, True),
        ("5", "<answer>\\boxed{5} so \\boxed{6}</answer>", False, True),
        ("5", "<answer>\\boxed{5</answer>", False, False),
        ("\\{1, 2\\}", "<answer>\\boxed{\\{1,2\\}}</answer>", True, True),
    ],
)
def test_strict_math_by_hand(gold: str, text: str, correct: bool, formatted: bool) -> None:
    task = MathProblems()
    example = latex_problem(gold)
    assert task.correct(example, text) is correct
    rewards = task.grade(example, text).parts
    assert rewards == {"correct": float(correct), "format": 0.1 if formatted else 0.0}


@pytest.mark.parametrize("protocol", ["strict", "d1"])
@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_references_are_right_in_every_split(name: str, protocol: str, tmp_path: Path) -> None:
    task: Any = offline_task(name, tmp_path, protocol=protocol)
    for split in SPLITS:
        for example in task.examples(split):
            text = task.reference(example)
            assert text is not None and "<<" not in text
            # d1: the reward wants the gold's comma, and evaluation then reads 3,589 as 589
            assert task.correct(example, text) is not (
                protocol == "d1" and "," in example.fields["answer"].split("#")[-1]
            )
            assert task.grade(example, text).parts["correct"] == (2.0 if protocol == "d1" else 1.0)
            assert not task.correct(example, "<answer> \\boxed{0} </answer>")
            inside = [text[start:end] for start, end in task.answer_spans(text)]
            assert len(inside) == len(set(task.answer_spans(text))) > 0
            assert example.fields["split"] == split


def test_answers_alone_are_enough() -> None:
    task = GSM8K()
    example = word_problem("18")
    assert task.reference(example) == "<answer> 18 </answer>" and task.correct(
        example, "<answer>18</answer>"
    )
    assert MathProblems().reference(latex_problem("\\pi")) == "<answer> \\boxed{\\pi} </answer>"


def test_boxes_are_protected_spans() -> None:
    task = MathProblems()
    text = "so \\boxed{\\frac{1}{2}} <answer> \\boxed{x} </answer> \\boxed{open"
    assert [text[start:end] for start, end in task.answer_spans(text)] == [
        "\\frac{1}{2}",
        " \\boxed{x} ",
    ]


def test_levels_are_kinds(tmp_path: Path) -> None:
    kinds = {e.fields["kind"] for e in offline_task("math", tmp_path).examples("train")}
    assert kinds == {f"level{n}" for n in range(1, 6)}


def test_published_prompts() -> None:
    """The texts of dllm-reasoning/d1, whose evaluation asks for a box that its training does
    not.
    """
    task = GSM8K(protocol="d1")
    layout = (
        "\nRespond in the following "
        "format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
    )
    assert task.prompt(word_problem()) == [{"role": "user", "content": f"{layout}\n\n{QUESTION}"}]
    user, prefill = task.prompt(word_problem(split="test"))
    assert prefill == {"role": "assistant", "content": "<reasoning>"}
    assert user["content"].endswith("<answer>\n\\boxed{...}\n</answer>\n\n" + QUESTION)
    assert "Wrap the final answer in a \\boxed{}. \nRespond" in user["content"]
    math = MathProblems(protocol="d1")
    assert (
        "Wrap the final answer in a \\boxed{}. \n\nFind {x} and"
        in math.prompt(latex_problem("1"))[0]["content"]
    )
    assert '</answer>" \n\n\nFind {x}' in math.prompt(latex_problem("1", "test"))[0]["content"]
    assert "Find {x} and so on." in MathProblems().prompt(latex_problem("1"))[0]["content"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # one line of reasoning, one of answer: everything but the soft format, which fails on its
        # own canonical layout
        (
            LAYOUT.format("36 * 50", "18"),
            {"correct": 2, "integer": 0.5, "strict": 0.5, "soft": 0, "xml": 0.5},
        ),
        # a second line of reasoning loses the strict format as well
        (
            LAYOUT.format("36 *\n50", "18"),
            {"correct": 2, "integer": 0.5, "strict": 0, "soft": 0, "xml": 0.5},
        ),
        (
            "<reasoning>x</reasoning><answer>18</answer>",
            {"correct": 2, "integer": 0.5, "strict": 0, "soft": 0.5, "xml": 0},
        ),
        (
            LAYOUT.format("x", "18.0"),
            {"correct": 0, "integer": 0, "strict": 0.5, "soft": 0, "xml": 0.5},
        ),
        (
            LAYOUT.format("x", "-18"),
            {"correct": 0, "integer": 0, "strict": 0.5, "soft": 0, "xml": 0.5},
        ),
        # characters after the answer cost twice, and the last line end is one of the second count
        # only
        (
            LAYOUT.format("x", "18") + "1234567890",
            {"correct": 2, "integer": 0.5, "strict": 0, "soft": 0, "xml": 0.48},
        ),
        # without a line end after the closing tag all of the text is charged
        (
            LAYOUT.format("x", "18").rstrip(),
            {"correct": 2, "integer": 0.5, "strict": 0, "soft": 0, "xml": 0.5 - 0.048 + 0.001},
        ),
        ("18", {"correct": 2, "integer": 0.5, "strict": 0, "soft": 0, "xml": 0}),
    ],
)
def test_published_gsm8k_rewards(text: str, parts: dict[str, float]) -> None:
    task = GSM8K(protocol="d1")
    example = word_problem()
    got = {
        name.removesuffix("_format").removesuffix("_count"): score
        for name, score in task.grade(example, text).parts.items()
    }
    assert got == pytest.approx(parts)


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("#### 18", "\\boxed{18} then \\boxed{3}", True),
        ("#### 18", "\\boxed{3} then \\boxed{18}", False),
        ("#### 18", "\\boxed{...} \\boxed{x} \\boxed{18 eggs}", True),
        ("#### 1,234", "\\boxed{1,234}", False),
        ("#### 1", "\\boxed{1,234}", True),
        ("#### 1,234", "<answer>1,234</answer>", False),
        ("#### 234", "<answer>1,234</answer>", True),
        ("#### 1,234", "\\boxed{1234}", True),
        ("#### 18", "<answer>3 or 18</answer>", True),
        ("#### 18", "<answer>18</answer><answer>3</answer>", True),
        ("#### 18", "<answer>18", False),
        ("#### -5", "\\boxed{-5}", False),
        ("#### 18", "\\boxed{\n18} <answer>7</answer>", False),
        ("#### 18", "\\boxed{1\n \\boxed{18}", True),
        ("#### 18", "\\boxed{\\frac{36}{2}}", False),
        ("#### 36", "\\boxed{\\frac{36}{2}}", True),
        ("#### 18", "\\boxed{1.8e1}", True),
        ("#### 18", "\\boxed{\u0661\u0668}", True),
    ],
)
def test_published_gsm8k_parser(gold: str, text: str, correct: bool) -> None:
    assert GSM8K(protocol="d1").correct(word_problem(gold, "test"), text) is correct


@given(
    st.lists(
        st.sampled_from(["\\boxed{", "\\boxed", "{", "}", "\n", "1", " ", "x"]), max_size=30
    ).map("".join)
)
def test_the_linear_box_search_is_the_published_expression(text: str) -> None:
    assert d1_math._flat_boxes(text) == re.findall(r"\\boxed{(.*?)}", text)


@pytest.mark.parametrize(
    ("gold", "text", "trained", "evaluated"),
    [
        ("\\frac{1}{2}", "\\boxed{\\dfrac12}", True, True),
        ("\\frac{1}{2}", "<answer>\\boxed{1/2}</answer>", True, True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True, True),
        ("\\frac{1}{4}", "\\boxed{0.25}", False, False),
        # without a box the whole text is the answer, and the answer block is never looked at
        ("5", "<answer>5</answer>", False, False),
        ("5", "5", True, True),
        # only an open or empty box falls back to it, and only in evaluation
        ("5", "\\boxed{6 <answer>5</answer>", False, True),
        ("5", "\\boxed{} <answer>5</answer>", False, True),
        ("5", "\\boxed{6} \\boxed{5}", True, True),
        ("5", "\\boxed 5", True, True),
        ("5", "\\fbox{5}", False, False),
        ("5", "\\boxed{x=5}", True, True),
        ("5", "\\boxed{5\\text{ cm}}", True, True),
        ("5", "\\boxed{5\\%}", True, True),
        ("5", "\\boxed{5\\text{ cm}\\text{ wide}}", False, False),
        ("\\sqrt{3}", "\\boxed{\\sqrt3}", True, True),
        # a slash between anything but integers makes normalising fail: raw strings are compared
        ("x/2", "\\boxed{x /2}", False, False),
        ("x/2", "\\boxed{x/2}", True, True),
        ("1,234", "\\boxed{1234}", False, False),
    ],
)
def test_published_math_judges(gold: str, text: str, trained: bool, evaluated: bool) -> None:
    task = MathProblems(protocol="d1")
    assert task.grade(latex_problem(gold), text).parts["correct"] == 2.0 * trained
    assert task.correct(latex_problem(gold), text) is evaluated


def test_the_published_box_bonus_never_fires() -> None:
    task = MathProblems(protocol="d1")

    def bonus(text: str) -> float:
        return task.grade(latex_problem("5"), text).parts["format"]

    assert bonus("<answer>\\boxed{5}</answer>") == bonus("<answer>5") == 0.75
    assert bonus("\\boxed{5}") == bonus("5") == 0.25
    # what it would take: a backspace character
    assert bonus("<answer>\boxed</answer>") == 1.0


GIANTS = [
    "\\boxed{" * 10**5,
    "\\boxed{" * 10**5 + "}" * 10**5,
    "\\boxed{1\n" * 10**5,
    "<reasoning></reasoning><answer>" * 10**5,
    "<answer>" * 10**5,
    "</answer><answer>" * 10**5,
    "<answer>\\boxed{" + "9" * 10**6 + "}</answer>",
    "<answer>\\boxed{" + "{" * 10**5 + "}</answer>",
    "<answer>" + "\\frac" * 10**5 + "</answer>",
    "<answer>" + "1," * 10**5 + "</answer>",
    "<answer>\\boxed{9^{9^{9^{9}}}}</answer>",
    "<answer>\\boxed{" + "((9!)!)!" + "}</answer>",
    "<answer>\u0665\u00b2</answer>",
    "\x00" * 10**6,
]


@pytest.mark.parametrize("protocol", ["strict", "d1"])
@pytest.mark.parametrize("make", [GSM8K, MathProblems])
def test_giants_are_graded_quickly(make: Any, protocol: str) -> None:
    task = make(protocol=protocol)
    example = Example(
        id="x",
        fields={"question": "How many?", "problem": "How many?", "answer": "7", "split": "test"},
    )
    start = time.process_time()  # a quadratic judge would take hours
    for text in GIANTS:
        grade = task.grade(example, text)
        assert not grade.correct and sum(grade.parts.values()) <= 1.0
        task.answer_spans(text)
    assert time.process_time() - start < 10


PIECES = ["<answer>", "</answer>", "\\boxed{", "}", "18", "\\frac", "x", "=", "^", "\n", "{"]


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="<answer></answer>\\boxed{}0123456789^!/,.=() x\n\u0661", max_size=80)
    | st.lists(st.sampled_from(PIECES)).map("".join)
)
def test_any_text_is_graded(text: str) -> None:
    for protocol in ("strict", "d1"):
        for task, example in (
            (GSM8K(protocol=protocol), word_problem()),
            (MathProblems(protocol=protocol), latex_problem("18")),
        ):
            parts = list(task.grade(example, text).parts.values())
            assert all(-0.2 <= part <= 2.0 for part in parts)
            assert task.correct(example, text) in (True, False)
            assert all(0 <= start <= end <= len(text) for start, end in task.answer_spans(text))


def test_math_verify_is_asked_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs math-verify to compare answers: pip install 'unmaskrl\[tasks\]'"
    ):
        MathProblems()
    assert MathProblems(protocol="d1").correct(latex_problem("5", "test"), "\\boxed{5}")
    assert GSM8K().correct(word_problem(), "<answer>18</answer>")


def test_rows_are_ours() -> None:
    assert len({row["question"] for row in GSM8K_ROWS}) == len(GSM8K_ROWS)
