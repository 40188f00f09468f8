r"""The judges in both directions: known cases, one-place changes that must be wrong, rewritings
that must be right.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.answer_changes import FOLDER, golds, mutations, rewritings
from tests.offline_tasks import write_rows
from unmaskrl import tasks
from unmaskrl.tasks import Example
from unmaskrl.tasks.base import SPLITS
from unmaskrl.tasks.math.equivalence import ALGEBRA, equivalent

pytest.importorskip("math_verify")

# Every tenth change of every answer; all of them, in over a minute, with UNMASKRL_ALL_CHANGES=1.
STRIDE = 1 if os.environ.get("UNMASKRL_ALL_CHANGES") else 10
CASES = [
    json.loads(line) for line in (FOLDER / "cases.jsonl").read_text(encoding="utf-8").splitlines()
]
FIELDS: dict[str, Any] = {
    "math": lambda case: {"problem": "p", "answer": case["gold"]},
    "gsm8k": lambda case: {"question": case["question"], "answer": f"#### {case['gold']}"},
    "countdown": lambda case: {"numbers": case["numbers"], "target": case["target"]},
    "sudoku": lambda case: {"puzzle": case["puzzle"]},
}


@pytest.mark.parametrize("case", CASES, ids=[str(number) for number in range(len(CASES))])
def test_known_cases(case: dict[str, Any]) -> None:
    task = tasks.load(case["task"])
    text = case.get("text") or f"<answer> \\boxed{{{case['answer']}}} </answer>"
    assert (
        task.correct(Example(id="case", fields=FIELDS[case["task"]](case)), text) is case["right"]
    )


def test_no_change_of_one_place_is_right() -> None:
    """Numbers, signs, brackets, variables, functions, members, hedges and words: none of thousands
    is taken for the answer.
    """
    counts = Counter()
    wrongly_right = []
    for number, gold in enumerate(golds()):
        for place, (kind, changed) in enumerate(mutations(gold)):
            if (place + number) % STRIDE == 0:
                counts[kind] += 1
                if equivalent(gold, changed):
                    wrongly_right.append((kind, gold, changed))
    assert wrongly_right == []
    assert (
        sum(counts.values()) * STRIDE > 9000
        and min(counts.values()) * STRIDE > 40
        and len(counts) == 8
    )
    assert ALGEBRA.crashes == 0


def test_every_answer_is_its_own_rewritings() -> None:
    """In dollars, boxes, bold, fences, after a name, with a full stop, in Unicode: thousands, all
    right, and quick.
    """
    start = time.process_time()
    pairs = [(name, gold, text) for gold in golds() for name, text in rewritings(gold).items()]
    assert [pair for pair in pairs if not equivalent(pair[1], pair[2])] == []
    assert len(pairs) > 5000 and time.process_time() - start < 30


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "x=7=7"),
        ("\\frac{7}{3}", "2 \\frac{1}{3}"),
        ("137 \\frac{1}{2}", "137 1/2"),
        ("137 \\frac{1}{2}", "137.5"),
        ("12\\text{ apples}", "12"),
        ("12", "12 \\text{ inches}"),
        ("12\\text{ inches}", "12 \\text{ in}"),
        ("12\\text{ square inches}", "12 \\text{ inches}^2"),
        ("2,-5", "x = -5 \\text{ and } x = 2"),
        ("2,-5", "x = 2 or x = -5"),
        ("2,-5", "\\{-5, 2\\}"),
        ("\\{2,-5\\}", "-5, 2"),
        ("2,-5", "$x=2$, $x=-5$"),
        ("(2,-5)", "(x, y) = (2, -5)"),
        ("(2,-5)", "\\left(\\frac{4}{2},-5\\right)"),
        ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
        ("1+\\sqrt{19}, 1-\\sqrt{19}", "x = 1 \\pm \\sqrt{19}"),
        ("(-\\infty, 2]", "x \\le 2"),
        ("(-\\infty, 2]", "2 \\ge x"),
        ("x \\le 2", "(-\\infty,2]"),
        ("[0,4) \\cup (9,\\infty)", "(9,\\infty) \\cup [0,4)"),
        ("0.56 = 56\\%", "0.56"),
        ("0.56 = 56\\%", "56\\%"),
        ("\\frac{2}{3}", "\\frac{2}{3} \\approx 0.67"),
        ("y = 2x+3", "y = 3+2x"),
        ("y = 2x+3", "2x+3"),
        ("2x-y+3=0", "y = 2x+3"),
        ("\\sqrt{12}", "2\\sqrt{3}"),
        ("x^2-1", "(x-1)(x+1)"),
        ("2516_8", "2516_{8}"),
        ("A5_{11}", "\\text{A5}_{11}"),
        ("\\frac{1}{2^{98}}", "2^{-98}"),
        ("1{,}000{,}000", "1\\,000\\,000"),
        ("1{,}000{,}000", "10^6"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 4/2 \\end{bmatrix}"),
        ("\\text{(C)}", "C"),
        ("\\text{even}", "even"),
        ("10", "m+n = 10"),
        ("\\frac{1}{2}", "\\sin\\theta = \\frac12"),
        ("7\\text{ apples}", "\\boxed{7\\text{ apples}}"),
    ],
)
def test_the_same_said_otherwise(gold: str, answer: str) -> None:
    assert equivalent(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5 \\text{ or six}"),
        ("5", "5 \\text{ if } x > 0"),
        ("5", "5, 5"),
        ("5", "6 = 5"),
        ("5", "x + 1 = 5"),
        ("5", "2x = 5"),
        ("5", "5 \\approx 6"),
        ("5", "x = 5, y = 6"),
        ("5", "x \\ne 5"),
        ("5", "x < 5"),
        ("5", "5x"),
        ("5", "\\{5, 6\\}"),
        ("5", "-5 = 5"),
        ("5\\text{ cm}", "5 \\text{ m}"),
        ("5\\text{ million}", "5"),
        ("x = 5", "y = 5"),
        ("x = 5", "x = 5, x = 6"),
        ("x=1,y=2", "x=2,y=1"),
        ("x=1,y=2", "y=1,x=2"),
        ("1,2", "x = 2, y = 1"),
        ("1,2,2", "1,1,2"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "1,2"),
        ("(1,2)", "\\{1,2\\}"),
        ("\\pm 2", "2"),
        ("2", "\\pm 2"),
        ("\\sqrt{2}", "1.414213562373095"),
        ("\\frac{1}{7}", "0.142857142857142857"),
        ("0.3", "0.2999999999"),
        ("\\pi", "3.14159265358979"),
        ("\\frac{2}{3}", "\\frac{2}{3} \\approx 0.68"),
        ("2x+3", "2X+3"),
        ("x_1+x_2", "x_1+x_1"),
        ("40", "40_8"),
        ("40_8", "32"),
        ("40_8", "40_{10}"),
        ("x < 5", "y < 5"),
        ("x < 5", "x \\le 5"),
        ("(2,\\infty)", "x \\ge 2"),
        ("(-3,8]", "-3 \\le x \\le 8"),
        ("\\text{east}", "\\text{seat}"),
        ("\\text{even}", "\\text{not even}"),
        ("3\\frac{2}{7}", "\\frac{6}{7}"),
        ("1234", "1 234"),
        ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ],
)
def test_what_is_not_the_same(gold: str, answer: str) -> None:
    assert not equivalent(gold, answer)


def test_words_of_the_problem_may_be_units_but_not_change_the_number() -> None:
    words = frozenset("how many million marbles or beads are not in the box with five x e".split())
    assert equivalent("5", "5 \\text{ marbles}", words) and equivalent("5", "5\\text{ bead}", words)
    for tail in ("million", "million marbles", "or beads", "are not", "five", "x", "e", "tins"):
        assert not equivalent("5", f"5 \\text{{ {tail}}}", words), tail


ROWS = {
    "gsm8k": [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(60)],
    "math": [{"problem": f"What is {n}?", "answer": str(n)} for n in range(60)],
    "jsonl": [{"prompt": f"What is {n}?", "answer": n} for n in range(60)],
}
BAD: list[tuple[str, dict[str, str], object, str]] = [
    ("gsm8k", {}, "#### five", "got answer '#### five', expected one that ends"),
    ("gsm8k", {}, None, "got null in column 'answer'"),
    ("math", {}, "", "got an empty answer"),
    ("math", {}, "\\frac{1}{2", "the judge calls the row's own answer"),
    ("math", {}, "{}", "the judge calls the row's own answer"),
    ("math", {"protocol": "d1"}, " ", "got an empty answer"),
    (
        "jsonl",
        {"verifier": "number"},
        "5 dollars",
        "the judge calls the row's own answer '5 dollars' wrong",
    ),
    ("jsonl", {"verifier": "number"}, "seven", "the judge calls the row's own answer"),
    ("jsonl", {"verifier": "number"}, True, "the judge calls the row's own answer 'True' wrong"),
    ("jsonl", {"verifier": "number"}, "1e400", "the judge calls the row's own answer"),
    ("jsonl", {"verifier": "math"}, "{5", "the judge calls the row's own answer"),
    ("jsonl", {"verifier": "exact"}, "a</answer>b", "the judge calls the row's own answer"),
    ("jsonl", {"verifier": "exact"}, " ", "the judge calls the row's own answer"),
    ("jsonl", {"verifier": "exact"}, None, "got null in column 'answer': give it a value"),
]


@pytest.mark.parametrize(("name", "settings", "answer", "words"), BAD)
def test_a_gold_that_nothing_could_match_is_refused(
    name: str, settings: dict[str, str], answer: object, words: str, tmp_path: Path
) -> None:
    problem = next(iter(ROWS[name][0]))
    data = write_rows(
        tmp_path / "rows.jsonl", [*ROWS[name], {problem: "What else?", "answer": answer}]
    )
    with pytest.raises(ValueError) as info:
        tasks.load(name, data=data, **settings).examples("train")
    assert f"rows.jsonl:61: {words}" in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("answer", ["work it out: 40 + 5 = 45\n#### 45", "$45", 45.0, "45.00"])
def test_numbers_are_read_as_people_write_them(answer: object, tmp_path: Path) -> None:
    rows = [{"prompt": f"p {n}", "answer": answer} for n in range(60)]
    task = tasks.load("jsonl", data=write_rows(tmp_path / "rows.jsonl", rows), verifier="number")
    example = task.examples("train")[0]
    reference = task.reference(example)
    assert reference is not None and task.correct(example, reference)
    assert task.correct(example, "<answer>\\boxed{45}</answer>") and not task.correct(
        example, "<answer>40</answer>"
    )
    big = Example(id="big", fields={"prompt": "p", "answer": 1e20})
    assert task.reference(big) == "<answer> 100000000000000000000 </answer>"


def hub(monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, object]]) -> None:
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, config: splits)
    )


@pytest.mark.parametrize("protocol", ["strict", "d1"])
def test_bad_rows_of_the_hub_are_left_out_and_counted(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good: list[dict[str, object]] = [
        {"problem": f"p {n}", "solution": f"It is $\\boxed{{{n}}}$."} for n in range(60)
    ]
    odd: list[dict[str, object]] = [
        {"problem": "q 1", "solution": "It is $\\boxed 2$."},
        {"problem": "q 2", "solution": "It is $\\fbox{5}$."},
        {"problem": "q 3", "solution": "It is $\\boxed{}$."},
        {"problem": "q 4", "solution": "It is 7."},
    ]
    hub(monkeypatch, train=[*good, *odd], test=good[:5])
    task: Any = tasks.load("math", data=f"some/math-{protocol}", protocol=protocol)
    found = {
        e.fields["problem"]: e.fields["answer"] for split in SPLITS for e in task.examples(split)
    }
    assert found["q 1"] == "2" and found["q 2"] == "5" and not {"q 3", "q 4"} & set(found)
    (note,) = task.notes
    assert "2 of 64 rows" in note or "2 of 62 rows" in note or "2 of 59 rows" in note
    assert (
        f"of some/math-{protocol} can never be right and are left out; first: "
        f"some/math-{protocol}/train:6" in note
    )


def test_a_data_set_for_another_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, test=[{"problem": f"p {n}", "solution": "no box"} for n in range(9)])
    with pytest.raises(
        ValueError,
        match=r"some/prose/test:\d: got a solution without .* \(9 of 9 rows are like this: is",
    ):
        tasks.load("math", data="some/prose").examples("test")


def test_judging_golds_is_quick(tmp_path: Path) -> None:
    """As many rows as MATH has for training, each with its worked solution."""
    answers = golds()
    rows = [
        {
            "problem": f"Find number {n}.",
            "solution": f"{'We compute. ' * 40}So it is $\\boxed{{{answers[n % len(answers)]}}}$.",
        }
        for n in range(7500)
    ]
    task = tasks.load("math", data=write_rows(tmp_path / "rows.jsonl", rows))
    start = time.process_time()
    assert len(task.examples("train")) > 5500
    assert time.process_time() - start < 20
