"""d1's protocol for countdown and sudoku: prompts, rewards and parsers with their quirks, against
hand-worked cases.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from pathlib import Path

import pytest

from unmaskrl.tasks import Countdown, Example, Sudoku, as_trl_reward
from unmaskrl.tasks.d1.d1_arithmetic import python_value
from unmaskrl.tasks.d1.d1_puzzles import (
    countdown_correct,
    countdown_prompt,
    countdown_score,
    sudoku_evaluation_grid,
    sudoku_prompt,
)

PUZZLE = "3014002020004130"
SOLUTION = "3214142323414132"
COUNTDOWN = Countdown(protocol="d1")
SUDOKU = Sudoku(protocol="d1")


def numbers(*given: int, target: int) -> Example:
    return Example(
        id="hand",
        fields={
            "numbers": list(given),
            "target": target,
            "solution": None,
            "kind": "",
            "split": "train",
        },
    )


def sudoku(puzzle: str = PUZZLE, solution: str | None = SOLUTION) -> Example:
    return Example(id="hand", fields={"puzzle": puzzle, "solution": solution, "split": "train"})


def digest(messages: list[dict[str, str]]) -> str:
    return hashlib.sha256(messages[0]["content"].encode()).hexdigest()[:16]


def test_prompts_are_the_published_ones() -> None:
    """Digests of the strings that the published functions build (facebookresearch/SPG
    spg/data_utils.py, eval/; d1 eval/).
    """
    assert digest(countdown_prompt([3, 7, 12], 33, True)) == "d8882791b6949c7b"
    assert digest(countdown_prompt([3, 7, 12], 33, False)) == "627d46281f669dea"
    training = [digest(sudoku_prompt(PUZZLE, shots, True)) for shots in range(4)]
    evaluation = [digest(sudoku_prompt(PUZZLE, shots, False)) for shots in range(4)]
    assert training == [
        "9b45af9ef7d2ab87",
        "47ed9508ca4ec115",
        "53efe56177b25399",
        "75bd25432a8cc518",
    ]
    assert evaluation == [
        "9b45af9ef7d2ab87",
        "77c5c360c028649c",
        "b15b47e84f525759",
        "3927a9685707a1a9",
    ]


def test_the_split_chooses_the_prompt() -> None:
    for task in (
        Countdown(protocol="d1", train_size=3, eval_size=3),
        Sudoku(protocol="d1", train_size=3, eval_size=3, few_shot=3),
    ):
        roles = {
            split: [m["role"] for m in task.prompt(task.examples(split)[0])]
            for split in ("train", "validation", "test")
        }
        assert roles == {
            "train": ["user"],
            "validation": ["user", "assistant"],
            "test": ["user", "assistant"],
        }
        assert task.prompt(task.examples("test")[0])[1]["content"] == "<reasoning>"
        assert "split" not in type(task)(train_size=3, eval_size=3).examples("test")[0].fields


@pytest.mark.parametrize(
    ("body", "score"),
    [
        ("3*7+12", 1.0),
        (" ( 3 * 7 ) +\t12 ", 1.0),
        ("12+21/(7)*7/3*3-0", 0.1),  # other digits
        ("3*7+12=33", 0.1),  # an equals sign is no arithmetic
        ("(3*7+\n12)", 1.0),
        ("3*7\n+12", 0.1),  # a line end outside parentheses is a syntax error
        ("37-12", 0.1),
        ("3.7+12", 0.1),  # 15.7: the dot splits the digits for the check, not for the value
        ("33", 0.1),
        ("", 0.1),
        ("3*7+12)", 0.1),
        ("03*7+12", 0.1),
        ("--3*7+12", 1.0),
        ("3**7+12", 0.1),
        ("\u0663*7+12", 0.1),  # the digit check takes it, the evaluation does not
    ],
)
def test_countdown_training_reward(body: str, score: float) -> None:
    example = numbers(3, 7, 12, target=33)
    assert COUNTDOWN.grade(example, f"<answer>\n{body}\n</answer>").parts["score"] == score
    assert (
        COUNTDOWN.grade(example, f"<answer>1</answer> or <answer>{body}</answer></answer>").parts[
            "score"
        ]
        == score
    )


def test_powers_floors_decimals_and_the_tolerance_count() -> None:
    assert countdown_score("<answer>2**3</answer>", [2, 3], 8) == 1.0
    assert countdown_score("<answer>7//2</answer>", [2, 7], 3) == 1.0
    assert countdown_score("<answer>3.7*2</answer>", [2, 3, 7], 7) == 0.1
    # 2 and 5 were to be two numbers
    assert countdown_score("<answer>2.5*4</answer>", [2, 4, 5], 10) == 1.0
    # 33 + 1/200000: wrong, yet within 1e-5; one more than that is not.
    assert countdown_score("<answer>33+1/200000</answer>", [1, 33, 200_000], 33) == 1.0
    assert countdown_score("<answer>33+1/90000</answer>", [1, 33, 90_000], 33) == 0.1
    assert countdown_score("<answer>9**9**9</answer>", [9, 9, 9], 9) == 0.1


def test_countdown_answer_blocks_pair_up_as_a_lazy_pattern_does() -> None:
    assert countdown_score("<answer>3*7+12", [3, 7, 12], 33) == 0.0
    # From the first opening tag: the body holds a tag, so it is no arithmetic. The strict parser
    # takes the last one.
    text = "<answer>1<answer>3*7+12</answer>"
    assert countdown_score(text, [3, 7, 12], 33) == 0.1
    assert Countdown().correct(numbers(3, 7, 12, target=33), text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"<answer>\boxed{3*7+12}</answer>", True),
        (r"\boxed{1} then \boxed{3 \times 7 + 12}", True),
        (r"\boxed{3*7+12} then \boxed{1}", False),
        (r"\boxed{3*7+12 = 33}", True),
        (r"\boxed{3*7+12 = 34}", True),  # what it is said to equal is not read
        (r"\boxed{33 = 3*7+12}", False),
        (r"<answer>3*7+12</answer>", False),  # no box: the whole text is graded, tags and all
        ("3*7+12", True),
        ("<answer>3*7+12=33</answer>", True),  # ... unless it has an equation
        ("3 * 7 = 21 ; 21 + 12 = 33 <answer>3*7+12</answer>", False),  # then the first one
        ("3 * 7 + 12 = 33 <answer>no idea</answer>", True),
        (r"\boxed{3*7+12", False),
        # only braces that never close lead to the answer block
        (r"<answer>3*7+12</answer> \boxed{", True),
        (r"\boxed 3*7+12$ done", True),
        (r"\fbox{3*7+12}", False),  # found, but its frame stays
        (r"\boxed{{3*7+12}}", False),
        (r"\boxed{63 \div 3 + 12}", False),
    ],
)
def test_countdown_evaluation(text: str, right: bool) -> None:
    assert COUNTDOWN.correct(numbers(3, 7, 12, target=33), text) is right


def test_references_satisfy_reward_and_evaluation() -> None:
    for task in (
        Countdown(protocol="d1", train_size=40),
        Sudoku(protocol="d1", train_size=40, steps=True),
    ):
        for example in task.examples("train"):
            reference = task.reference(example)
            assert reference is not None and task.correct(example, reference)
            assert task.grade(example, reference).parts["score"] == 1.0
            assert not task.correct(example, task.lazy(example))


def test_values_are_pythons_own() -> None:
    """Against eval, on short texts whose powers stay small."""
    rng = random.Random(0)
    pieces = [
        "1",
        "2",
        "3",
        "0",
        "00",
        "01",
        "2.",
        ".5",
        "1.5",
        *"()+-*/ .\n\t\r\x0b",
        "**",
        "//",
        "(1",
        "2)",
        "-(",
    ]
    values = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for _ in range(40_000):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
            if "**" in text and (text.count("**") > 2 or re.search(r"\d{3}", text)):
                continue
            try:
                expected = eval(text.strip(), {"__builtins__": None}, {})
            except Exception:
                expected = None
            expected = None if expected is Ellipsis or expected == () else expected
            got = python_value(text)
            assert got == expected and type(got) is type(expected), text
            values += got is not None
    assert values > 3000


@pytest.mark.parametrize(
    ("body", "score"),
    [
        (SOLUTION, 1.0),
        (" ".join(SOLUTION), 1.0),
        (SOLUTION + "999", 1.0),  # cut to 16
        ("3214 1423 2341 413", 7 / 8),  # padded with 0: the last blank is wrong
        ("0" * 16, 0.0),
        ("R1: " + SOLUTION, 0.0),  # every digit counts, so all shift by one
        ("9" + SOLUTION[1:], 1.0),  # clues need not be kept
        ("none", 0.0),
        ("", 0.0),
    ],
)
def test_sudoku_training_reward_is_the_share_of_blanks(body: str, score: float) -> None:
    assert PUZZLE.count("0") == 8
    assert SUDOKU.grade(sudoku(), f"<answer>\n{body}\n</answer>").parts["score"] == pytest.approx(
        score
    )


def test_sudoku_without_blanks_or_solution_scores_nothing() -> None:
    for example in (sudoku(puzzle=SOLUTION), sudoku(solution=None)):
        assert SUDOKU.grade(example, f"<answer>{SOLUTION}</answer>").parts["score"] == 0.0
        assert not SUDOKU.correct(example, f"<answer>{SOLUTION}</answer>")


def test_sudoku_evaluation_reads_more_than_the_answer_block() -> None:
    for text in (
        f"<answer>{SOLUTION}</answer>",
        f"<answer>as a grid:\n```\n{SOLUTION[:8]}\n{SOLUTION[8:]}\n```\nso {'1' * 16}</answer>",
        f"<answer>{SOLUTION}<|endoftext|>",
        "<reasoning>\n1 is "
        f"left.\n</reasoning>\n<answer>\n{SOLUTION[:8]}\n{SOLUTION[8:]}<|eot_id|><|endoftext|>",
        f"<answer></answer> {SOLUTION}<|eot_id|> 1",
        f"it is {SOLUTION}",
        f"{SOLUTION} </answer>",
    ):
        assert SUDOKU.cells(sudoku(), text) == (8, 8) and SUDOKU.correct(sudoku(), text)
    # The first block counts here, the last one in training.
    both = f"<answer>{'0' * 16}</answer><answer>{SOLUTION}</answer>"
    assert SUDOKU.cells(sudoku(), both) == (0, 8)
    assert SUDOKU.grade(sudoku(), both).parts["score"] == 1.0
    # White space goes, other characters stay and shift.
    assert SUDOKU.cells(sudoku(), f"<answer>{','.join(SOLUTION)}</answer>")[0] < 8


def test_sudoku_evaluation_equals_the_published_patterns() -> None:
    """The five published patterns, in order, on short random texts (they are not linear, ours
    are).
    """
    patterns = [
        r"<answer>.*?```\s*([\d\s]+)```",
        r"<answer>(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|</answer>)",
        r"</answer>\s*(.*?)(?:<\|eot_id\|>|<\|endoftext\|>|$)",
        r".*?(\d{16})\s*</answer>",
        r"\b(\d{16})\b",
    ]

    def published(text: str) -> str:
        for pattern in patterns:
            match = re.search(pattern, text, re.DOTALL)
            if match and match[1].strip():
                return re.sub(r"\s", "", match[1].strip())
        return ""

    rng = random.Random(1)
    found = set()
    pieces = [
        "<answer>",
        "</answer>",
        "```",
        "`",
        " ",
        "\n",
        "12",
        SOLUTION,
        SOLUTION + "1",
        "<|eot_id|>",
        "<|endoftext|>",
        "x",
    ]
    for _ in range(30_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        assert (sudoku_evaluation_grid(text) or "") == published(text), text
        found.add(published(text))
    assert len(found) > 100


def test_countdown_evaluation_finds_the_equation_of_the_published_pattern() -> None:
    pattern = r"([0-9+\-*/() ]+)=[0-9. ]+"
    rng = random.Random(2)
    found = 0
    pieces = ["3*7+12", "3 * 7", "=", "33", " ", "x", "= ", ".", "21+12", "\n"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        match = re.search(pattern, text)
        equation = match[1].strip() if match else text
        expected = (
            sorted(map(int, re.findall(r"\d+", equation))) == [3, 7, 12]
            and python_value(equation) == 33
        )
        assert countdown_correct(text, [3, 7, 12], 33) is expected, text
        found += expected
    assert found > 200


def test_the_columns_of_the_published_sets(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"nums": [44, 19, 35], "target": 98},
        {"input": "30,100,93", "output": "23"},
        {"numbers": [1, 2, 3], "target": 6},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples = Countdown(data=str(path), protocol="d1").examples("test")
    problems = [(example.fields["numbers"], example.fields["target"]) for example in examples]
    assert problems == [([44, 19, 35], 98), ([30, 100, 93], 23), ([1, 2, 3], 6)]
    assert examples[1].fields["input"] == "30,100,93" and examples[0].fields["split"] == "test"
    path.write_text(json.dumps({"Puzzle": PUZZLE, "Solution": SOLUTION}) + "\n", encoding="utf-8")
    example = Sudoku(data=str(path), protocol="d1").examples("train")[0]
    assert (example.fields["puzzle"], example.fields["solution"]) == (PUZZLE, SOLUTION)
    reward = as_trl_reward(SUDOKU, "score")
    assert reward(
        prompts=[""],
        completions=[f"<answer>{SOLUTION}</answer>"],
        puzzle=[PUZZLE],
        solution=[SOLUTION],
    ) == [1.0]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("countdown", {"nums": "1 2 3", "target": 3}, "got numbers '1 2 3'"),
        ("countdown", {"input": "1,2,x", "output": "3"}, r"got numbers \[1, 2, 'x'\]"),
        ("countdown", {"input": "1,2,3", "output": "x"}, "got target 'x'"),
        ("countdown", {"input": "1,2,3", "output": "1" * 5000}, "got target '111"),
        (
            "sudoku",
            {"Puzzle": int(PUZZLE), "Solution": SOLUTION},
            "got puzzle 3014002020004130, expected a string",
        ),
        (
            "sudoku",
            {"Puzzle": PUZZLE, "Solution": SOLUTION[::-1]},
            "got solution '2314.*', expected a valid grid",
        ),
        (
            "sudoku",
            {"Puzzle": PUZZLE, "Solution": "1" * 16},
            "got solution .*, expected a valid grid of 16 digits that keeps",
        ),
    ],
)
def test_bad_published_rows_are_named(
    tmp_path: Path, task: str, row: dict[str, object], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: {message}"):
        (Countdown if task == "countdown" else Sudoku)(data=str(path)).examples("test")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"protocol": "d2"}, "protocol 'd2' is not one of strict, d1"),
        ({"protocol": "d1", "few_shot": 4}, r"few_shot is 4, expected an integer in 0\.\.3"),
        ({"few_shot": 1}, "only the prompts of protocol d1 have examples"),
        ({"protocol": "d1", "size": 9}, "published for 4x4 only"),
    ],
)
def test_bad_protocol_settings_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sudoku(**kwargs)
