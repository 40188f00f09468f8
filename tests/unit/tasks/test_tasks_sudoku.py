"""Sudoku: grids and puzzles against brute force, every valid grid counts, worked steps are
forced.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from unmaskrl.tasks.base import Example
from unmaskrl.tasks.puzzles.sudoku import Sudoku
from unmaskrl.tasks.puzzles.sudoku_grids import (
    all_grids,
    forced_order,
    lazy_grid,
    solutions,
    split_grids,
    valid_grid,
)

SPLITS = ("train", "validation", "test")
GRID = "1234341221434321"


def make(puzzle: str) -> Example:
    return Example(
        id="hand", fields={"puzzle": puzzle, "solution": next(iter(solutions(puzzle)), None)}
    )


def is_sudoku(grid: str) -> bool:
    """Independent of the units of the package: no two equal digits in a row, column or box."""
    for a in range(16):
        for b in range(a):
            row = a // 4 == b // 4
            column = a % 4 == b % 4
            box = (a // 8, a % 4 // 2) == (b // 8, b % 4 // 2)
            if grid[a] == grid[b] and (row or column or box):
                return False
    return set(grid) <= set("1234")


@pytest.fixture(scope="module")
def task() -> Sudoku:
    return Sudoku(train_size=1500, eval_size=300)


def test_all_grids() -> None:
    grids = all_grids()
    assert len(grids) == len(set(grids)) == 288
    assert list(grids) == sorted(grids)
    assert all(map(is_sudoku, grids))


def test_valid_grid_agrees_with_the_pairwise_rule() -> None:
    assert valid_grid(GRID)
    for cell, digit in product(range(16), "01234"):
        changed = GRID[:cell] + digit + GRID[cell + 1 :]
        assert valid_grid(changed) == is_sudoku(changed)


def test_splits_share_no_grid_and_no_puzzle_for_any_seeds(task: Sudoku) -> None:
    grids = [set(split_grids(split)) for split in SPLITS]
    assert [len(part) for part in grids] == [202, 28, 58]
    assert set.union(*grids) == set(all_grids())
    for seed, split in enumerate(SPLITS):
        examples = [
            *task.examples(split),
            *Sudoku(seed=seed + 1, train_size=100, eval_size=100).examples(split),
        ]
        assert {example.fields["solution"] for example in examples} <= set(split_grids(split))


def test_puzzles_are_distinct_unique_and_within_the_range(task: Sudoku) -> None:
    for split in SPLITS:
        examples = task.examples(split)
        assert len({example.fields["puzzle"] for example in examples}) == len(examples)
        for example in examples:
            puzzle = example.fields["puzzle"]
            assert solutions(puzzle) == [example.fields["solution"]]
            assert 8 <= puzzle.count("0") <= 12


def test_the_numbers_of_blanks_are_balanced(task: Sudoku) -> None:
    counts = Counter(example.fields["puzzle"].count("0") for example in task.examples("train"))
    assert all(200 < counts[blanks] < 400 for blanks in range(8, 13))


def test_reference_is_right_and_lazy_is_wrong(task: Sudoku) -> None:
    for split in SPLITS:
        for example in task.examples(split):
            reference = task.reference(example)
            lazy = task.lazy(example)
            assert reference is not None and task.correct(example, reference)
            assert not task.correct(example, lazy)
            assert (
                task.grade(example, reference).parts["format"]
                == task.grade(example, lazy).parts["format"]
                == 0.1
            )


def test_lazy_by_hand() -> None:
    assert lazy_grid("0" * 16) == "1234" * 4
    assert lazy_grid("0300" + "2001" + "0040" + "4321") == "1324" + "2341" + "1243" + "4321"
    assert lazy_grid("1100" + "0" * 12) == "1123" + "1234" * 3


def test_the_layout() -> None:
    task = Sudoku()
    example = make("1234" + "3412" + "0143" + "4320")
    reference = "<answer> 1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1 </answer>"
    assert task.reference(example) == reference
    assert [reference[start:end] for start, end in task.answer_spans(reference)] == [
        " 1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1 "
    ]
    assert task.prompt(example)[0]["content"] == "sudoku 1 2 3 4 3 4 1 2 0 1 4 3 4 3 2 0"
    stepwise = Sudoku(steps=True)
    assert stepwise.reference(example) == f"3 1 = 2 ; 4 4 = 1 ; {reference}"
    lazy = stepwise.lazy(make("0034" + "3412" + "2143" + "4321"))
    assert lazy == "1 1 = 1 ; 1 2 = 2 ; <answer> 1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1 </answer>"
    instruct = Sudoku(prompt_style="instruct").prompt(example)[0]["content"]
    assert "1 2 3 4\n3 4 1 2\n0 1 4 3\n4 3 2 0" in instruct and "<answer>" in instruct


def test_worked_steps_are_forced_one_after_the_other(task: Sudoku) -> None:
    """A 4x4 puzzle with one solution yields to singles: each step must follow from what is filled
    so far.
    """
    for example in task.examples("test")[:100]:
        grid = list(example.fields["puzzle"])
        solution = example.fields["solution"]
        order = forced_order(example.fields["puzzle"], solution)
        assert sorted(order) == [cell for cell in range(16) if grid[cell] == "0"]
        for cell in order:
            assert follows(grid, cell, solution[cell])
            grid[cell] = solution[cell]


def follows(grid: list[str], cell: int, digit: str) -> bool:
    """Written apart from the package: only this digit fits here, or it fits nowhere else in some
    unit.
    """

    def fits(at: int, what: str) -> bool:
        return all(grid[other] != what for other in range(16) if other != at and share(at, other))

    if not any(fits(cell, other) for other in "1234" if other != digit):
        return True
    rules = [
        lambda at: at // 4 == cell // 4,
        lambda at: at % 4 == cell % 4,
        lambda at: (at // 8, at % 4 // 2) == (cell // 8, cell % 4 // 2),
    ]
    blanks = [at for at in range(16) if grid[at] == "0" and at != cell]
    return any(not any(rule(at) and fits(at, digit) for at in blanks) for rule in rules)


def share(a: int, b: int) -> bool:
    return a // 4 == b // 4 or a % 4 == b % 4 or (a // 8, a % 4 // 2) == (b // 8, b % 4 // 2)


def test_unforced_puzzles_still_get_an_order() -> None:
    assert sorted(forced_order("0" * 16, GRID)) == list(range(16))


def test_every_valid_grid_of_an_ambiguous_puzzle_counts() -> None:
    puzzle = "1200" + "0000" + "0000" + "0021"
    task = Sudoku()
    example = make(puzzle)
    brute = set()
    for digits in product("1234", repeat=4):
        for grid in all_grids():
            if grid.startswith("12" + "".join(digits[:2])) and grid.endswith(
                "".join(digits[2:]) + "21"
            ):
                brute.add(grid)
    assert len(brute) > 1 and brute == set(solutions(puzzle))
    accepted = {grid for grid in all_grids() if task.correct(example, f"<answer>{grid}</answer>")}
    assert accepted == brute


@pytest.mark.parametrize(
    ("text", "correct", "formatted"),
    [
        (f"<answer>{GRID}</answer>", True, True),
        (f"<answer> {' '.join(GRID)} </answer>", True, True),
        (
            f"<answer>\n{GRID[:4]}\n{GRID[4:8]}\n{GRID[8:12]}\n{GRID[12:]}\n</answer> bye",
            True,
            True,
        ),
        (f"<answer>1</answer><answer>{GRID}</answer>", True, False),
        (f"<answer>{GRID}</answer><answer>1</answer>", False, False),
        (f"<answer>{GRID}1</answer>", False, False),
        (f"<answer>{GRID[:15]}</answer>", False, False),
        (f"<answer>{GRID[:15]}0</answer>", False, False),
        (f"<answer>{GRID[:15]}5</answer>", False, False),
        (f"<answer>{','.join(GRID)}</answer>", True, True),
        (
            f"<answer>[[{','.join(GRID[:4])}], [{','.join(GRID[4:8])}],\n[{GRID[8:12]}], "
            f"[{GRID[12:]}]]</answer>",
            True,
            True,
        ),
        (f"<answer>```text\n|{'|'.join(GRID)}|\n```</answer>", True, True),
        (f"<answer>\\boxed{{{GRID}}}</answer>", True, True),
        (f"<answer>R1: {GRID}</answer>", False, False),
        (f"<answer>1. {GRID}</answer>", False, False),
        (f"<answer>{GRID} or {GRID}</answer>", False, False),
        (f"<answer>{GRID[:15]}\u0661</answer>", False, False),
        (f"<answer>{GRID[:15]}2</answer>", False, True),
        ("<answer>2143432112343412</answer>", False, True),
        (GRID, False, False),
    ],
)
def test_judge_by_hand(text: str, correct: bool, formatted: bool) -> None:
    task = Sudoku()
    example = make("1" + "0" * 14 + "1")
    assert task.correct(example, text) is correct
    assert task.grade(example, text).parts["correct"] == float(correct)
    assert task.grade(example, text).parts["format"] == (0.1 if formatted else 0.0)


def test_clues_must_be_kept() -> None:
    task = Sudoku()
    other = next(grid for grid in all_grids() if grid[5] != GRID[5])
    assert not task.correct(make("00000" + GRID[5] + "0" * 10), f"<answer>{other}</answer>")


def test_sizes_beyond_what_exists_are_refused() -> None:
    # With one blank its row says the digit: the lazy policy solves every such puzzle.
    with pytest.raises(
        ValueError, match=r"only about 0 validation puzzles with 1\.\.1 blanks, 5 were asked"
    ):
        Sudoku(min_blanks=1, max_blanks=1, eval_size=5).examples("validation")


def test_rows_replace_every_split(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"puzzle": "1" + "0" * 15, "level": 3}, {"puzzle": "12" + "0" * 14}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = Sudoku(data=str(path))
    for split in SPLITS:
        first, second = task.examples(split)
        assert first.fields["level"] == 3 and first.fields["solution"] in all_grids()
        assert task.correct(first, task.reference(first) or "")
        assert task.correct(second, task.reference(second) or "")


def test_a_puzzle_that_cannot_be_rewarded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"puzzle": puzzle}) for puzzle in ("0" * 16, "11" + "0" * 14)),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: puzzle 1100000000000000 has no solution"):
        Sudoku(data=str(path)).examples("test")
    path.write_text(json.dumps({"puzzle": GRID}), encoding="utf-8")
    assert Sudoku(data=str(path)).examples("test")
    with pytest.raises(
        ValueError,
        match=r"rows\.jsonl:1: got a puzzle without blanks, which protocol d1 never counts",
    ):
        Sudoku(data=str(path), protocol="d1").examples("test")


@pytest.mark.parametrize(
    "puzzle", ["0" * 15, "0" * 17, "0" * 15 + "5", "\u0661" + "0" * 15, None, 1000, ["0"] * 16]
)
def test_bad_rows_name_file_line_and_value(tmp_path: Path, puzzle: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps({"puzzle": puzzle}) + "\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: got puzzle .*, expected a string of 16 digits"
    ):
        Sudoku(data=str(path)).examples("test")
