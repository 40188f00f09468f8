"""Sudoku of 9x9 cells: puzzles against a solver written apart, splits, worked steps, files; and 4x4
as it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from unmaskrl.tasks import Sudoku
from unmaskrl.tasks.base import Example
from unmaskrl.tasks.puzzles.sudoku_grids import lazy_grid, relabelled, search, split_of, valid_grid

SPLITS = ("train", "validation", "test")
# Wikipedia's example; its solution is checked below by the pairwise rule.
KNOWN = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# 17 clues, and not solvable by forced cells alone.
HARD = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"


def make(puzzle: str, solution: str | None = None) -> Example:
    return Example(id="hand", fields={"puzzle": puzzle, "solution": solution})


def clash(a: int, b: int) -> bool:
    """Whether two cells share a row, a column or a box."""
    return a // 9 == b // 9 or a % 9 == b % 9 or (a // 27, a % 9 // 3) == (b // 27, b % 9 // 3)


def count_solutions(puzzle: str, limit: int = 2) -> int:
    """Plain backtracking over the blanks with the fewest digits left, written apart from the
    package.
    """
    grid = [int(digit) for digit in puzzle]
    peers = [
        [other for other in range(81) if other != cell and clash(cell, other)] for cell in range(81)
    ]

    def count(found: int) -> int:
        options = [
            (cell, set(range(1, 10)) - {grid[o] for o in peers[cell]})
            for cell in range(81)
            if not grid[cell]
        ]
        if not options:
            return found + 1
        cell, digits = min(options, key=lambda item: len(item[1]))
        for digit in digits:
            grid[cell] = digit
            found = count(found)
            grid[cell] = 0
            if found >= limit:
                break
        return found

    return count(0)


@pytest.fixture(scope="module")
def task() -> Sudoku:
    return Sudoku(size=9, train_size=200, eval_size=60)


def test_grids_are_valid_and_puzzles_have_one_solution(task: Sudoku) -> None:
    for split, size in zip(SPLITS, (200, 60, 60), strict=True):
        examples = task.examples(split)
        assert len({example.fields["puzzle"] for example in examples}) == size
        for example in examples:
            puzzle = example.fields["puzzle"]
            solution = example.fields["solution"]
            assert len(puzzle) == len(solution) == 81 and 30 <= puzzle.count("0") <= 45
            assert all(clue in ("0", digit) for clue, digit in zip(puzzle, solution, strict=True))
            assert not any(
                solution[a] == solution[b] and clash(a, b) for a in range(81) for b in range(a)
            )
            assert lazy_grid(puzzle) != solution
    for example in task.examples("train")[:20]:
        assert count_solutions(example.fields["puzzle"]) == 1


def test_the_independent_solver_sees_ambiguity() -> None:
    assert count_solutions("0" * 81) == 2 and count_solutions(KNOWN) == 1


def test_splits_share_no_solution_up_to_the_names_of_digits_for_any_seeds(task: Sudoku) -> None:
    seen: dict[str, set[str]] = {split: set() for split in SPLITS}
    for seed, split in enumerate(SPLITS):
        other = Sudoku(size=9, seed=seed + 1, train_size=60, eval_size=60)
        for example in [*task.examples(split), *other.examples(split)]:
            seen[split].add(relabelled(example.fields["solution"]))
    assert not seen["train"] & seen["validation"] and not seen["test"] & (
        seen["train"] | seen["validation"]
    )
    assert len(seen["train"]) > 250


def test_relabelling_keeps_the_split() -> None:
    renamed = SOLVED.translate(str.maketrans("123456789", "912345678"))
    assert (
        renamed != SOLVED
        and relabelled(renamed) == relabelled(SOLVED)
        and relabelled(SOLVED).startswith("123456789")
    )
    assert split_of(renamed) == split_of(SOLVED)


def test_the_number_of_blanks_is_a_setting() -> None:
    for low, high in ((1, 1), (20, 22), (48, 48)):
        # With one blank its row often says the digit, and a lazy policy would be right.
        examples = Sudoku(
            size=9, min_blanks=max(low, 5), max_blanks=max(high, 5), train_size=10
        ).examples("train")
        assert all(
            max(low, 5) <= example.fields["puzzle"].count("0") <= max(high, 5)
            for example in examples
        )
    assert (
        Sudoku(size=9, max_blanks=20, train_size=5).examples("train")[0].fields["puzzle"].count("0")
        == 20
    )
    with pytest.raises(ValueError, match=r"max_blanks is 51, expected an integer in 1\.\.50"):
        Sudoku(size=9, max_blanks=51)
    with pytest.raises(ValueError, match="size is 6, expected 4 or 9"):
        Sudoku(size=6)


def test_layout_reference_and_lazy() -> None:
    task = Sudoku(size=9, steps=True)
    example = make(KNOWN, SOLVED)
    reference = task.reference(example) or ""
    assert task.correct(example, reference) and not task.correct(example, task.lazy(example))
    assert reference.endswith(f"<answer> {' '.join(SOLVED)} </answer>") and reference.count(
        " = "
    ) == KNOWN.count("0")
    assert task.grade(example, task.lazy(example)).parts["format"] == 0.1
    assert task.prompt(example)[0]["content"] == f"sudoku {' '.join(KNOWN)}"
    content = Sudoku(size=9, prompt_style="instruct").prompt(example)[0]["content"]
    assert (
        "9 by 9 sudoku" in content
        and "3 by 3 box holds 1, 2, 3, 4, 5, 6, 7, 8 and 9 once" in content
    )
    assert "all 81 digits" in content and "5 3 0 0 7 0 0 0 0\n6 0 0 1 9 5 0 0 0" in content


def test_every_worked_step_follows(task: Sudoku) -> None:
    """Each filled cell has one digit left, or is the only one left for it in a row, column or
    box.
    """
    stepwise = Sudoku(size=9, steps=True)
    for example in task.examples("test")[:10]:
        grid = list(example.fields["puzzle"])
        for step in (stepwise.reference(example) or "").split("<answer>")[0].split(";")[:-1]:
            row, column, _, digit = step.split()
            cell = 9 * (int(row) - 1) + int(column) - 1
            assert grid[cell] == "0" and digit == example.fields["solution"][cell]
            fits = [
                {
                    d
                    for d in "123456789"
                    if not any(grid[o] == d and clash(o, at) for o in range(81))
                }
                for at in range(81)
            ]
            rules = (lambda o: o // 9, lambda o: o % 9, lambda o: (o // 27, o % 9 // 3))
            rivals = [
                [o for o in range(81) if o != cell and grid[o] == "0" and rule(o) == rule(cell)]
                for rule in rules
            ]
            assert fits[cell] == {digit} or any(
                all(digit not in fits[o] for o in group) for group in rivals
            )
            grid[cell] = digit
        assert "".join(grid) == example.fields["solution"]


def test_judge_by_hand() -> None:
    task = Sudoku(size=9)
    example = make(KNOWN, SOLVED)
    wrong = SOLVED[:2] + SOLVED[3] + SOLVED[2:3] + SOLVED[4:]
    rows = "\n".join(SOLVED[row : row + 9] for row in range(0, 81, 9))
    for text, correct, formatted in (
        (f"<answer>{SOLVED}</answer>", True, True),
        (f"<answer>\n{rows}\n</answer>", True, True),
        (f"<answer>{wrong}</answer>", False, True),
        (f"<answer>{relabelled(SOLVED)}</answer>", False, True),
        (f"<answer>{SOLVED}1</answer>", False, False),
        (f"<answer>{SOLVED[:80]}0</answer>", False, False),
        (SOLVED, False, False),
    ):
        assert task.correct(example, text) is correct
        assert task.grade(example, text).parts["format"] == (0.1 if formatted else 0.0)
    assert valid_grid(SOLVED) and not valid_grid(wrong) and not valid_grid("1" * 9)


def test_files_of_any_difficulty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"puzzle": KNOWN, "level": 1}, {"puzzle": HARD}, {"Puzzle": KNOWN, "Solution": SOLVED}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = Sudoku(size=9, data=str(path))
    known, hard, given = task.examples("test")
    assert (
        known.fields["solution"] == given.fields["solution"] == SOLVED
        and known.fields["level"] == 1
    )
    assert task.correct(hard, f"<answer>{hard.fields['solution']}</answer>")
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:1: got puzzle .*, expected a string of 16 digits 0\.\.4"
    ):
        Sudoku(data=str(path)).examples("test")
    path.write_text(json.dumps({"puzzle": "55" + "0" * 79}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: puzzle 550+ has no solution"):
        task.examples("test")


def test_the_search_finds_every_solution_once_and_ends() -> None:
    puzzle = "1200" + "0000" + "0000" + "0021"
    found = list(search(puzzle))
    assert len(found) == len(set(found)) > 1 and all(map(valid_grid, found))
    assert list(search(KNOWN)) == [SOLVED] and len(list(search("0" * 16))) == 288
    with pytest.raises(ValueError, match="no end of the search after 200000 guesses"):
        # Row 1 leaves 9 for its last cell, column 9 forbids it; nothing says so but exhaustion of
        # the other rows.
        list(search("0" * 81))


def test_generation_is_fast_enough() -> None:
    start = time.process_time()
    Sudoku(size=9, seed=77, train_size=100).examples("train")
    assert (time.process_time() - start) / 100 < 0.1


def test_4x4_is_what_it_was_before_9x9() -> None:
    """Digests made with the revision before this one: puzzles, prompts, references with and without
    steps.
    """

    def digest(task: Sudoku) -> str:
        rows = [
            json.dumps(
                [e.id, e.fields, task.prompt(e), task.reference(e), task.lazy(e)], sort_keys=True
            )
            for split in SPLITS
            for e in task.examples(split)
        ]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    assert digest(Sudoku()) == "d464260a8b57d76e"
    stepwise = Sudoku(steps=True, prompt_style="instruct", seed=3, train_size=500, eval_size=100)
    assert digest(stepwise) == "3e215280808a7947"
