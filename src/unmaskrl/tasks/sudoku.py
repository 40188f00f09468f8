"""4x4 sudoku: rows, columns and 2x2 boxes each hold 1..4 once.

The generator is ours: all 288 solution grids are listed, so uniqueness is a popcount and splits can be
disjoint by solution grid, which reasoning-gym's does not offer (nor does it leave out lazy solutions).
Every valid grid that agrees with the clues counts as correct, also where a puzzle from a file has several.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import permutations
from operator import and_
from typing import Any

from unmaskrl.tasks.base import (
    FORMAT_REWARD,
    PROMPT_STYLES,
    SPLITS,
    Example,
    RewardPart,
    answer_spans,
    check_choice,
    check_range,
    file_stamp,
    last_answer,
    only_answer,
    read_examples,
    stable_hash,
)

CELLS = range(16)
UNITS: tuple[tuple[int, ...], ...] = (
    *(tuple(range(4 * row, 4 * row + 4)) for row in range(4)),
    *(tuple(range(column, 16, 4)) for column in range(4)),
    *(tuple(corner + offset for offset in (0, 1, 4, 5)) for corner in (0, 2, 8, 10)),
)
# 4 clues are the fewest that make a 4x4 puzzle unique.
MOST_BLANKS = 12
_SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
_TRIES = 400

_INSTRUCT = (
    "Here is a 4 by 4 sudoku, read row by row from the top left; 0 marks an empty cell:\n\n{grid}\n\n"
    "Fill every empty cell so that each row, each column and each 2 by 2 box holds 1, 2, 3 and 4 once. "
    "Keep the given digits as they are. First work out the cells one at a time, writing each step as "
    "`row column = digit ;`. Then give all 16 digits, row by row and separated by blanks, inside "
    "<answer></answer>, with nothing else between the tags."
)


def valid_grid(grid: str) -> bool:
    """Whether 16 characters fill rows, columns and boxes with 1..4 once each."""
    return len(grid) == 16 and all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


@lru_cache(maxsize=1)
def all_grids() -> tuple[str, ...]:
    """The 288 solution grids in lexicographic order."""
    rows = ["".join(row) for row in permutations("1234")]
    pairs = [top + bottom for top in rows for bottom in rows if _disjoint_boxes(top, bottom)]
    return tuple(upper + lower for upper in pairs for lower in pairs if valid_grid(upper + lower))


def _disjoint_boxes(top: str, bottom: str) -> bool:
    return len(set(top[:2] + bottom[:2])) == 4 and len(set(top[2:] + bottom[2:])) == 4


@lru_cache(maxsize=1)
def _agreement() -> tuple[dict[str, int], ...]:
    """Per cell: digit -> bit mask of the grids that have it there."""
    grids = all_grids()
    return tuple(
        {digit: sum(1 << i for i, grid in enumerate(grids) if grid[cell] == digit) for digit in "1234"} for cell in CELLS
    )


def solutions(puzzle: str) -> list[str]:
    """All grids that agree with the clues of a puzzle (16 characters, 0 = blank)."""
    masks = [_agreement()[cell][digit] for cell, digit in enumerate(puzzle) if digit != "0"]
    mask = reduce(and_, masks, (1 << len(all_grids())) - 1)
    return [grid for index, grid in enumerate(all_grids()) if mask >> index & 1]


@lru_cache(maxsize=3)
def split_grids(split: str) -> tuple[str, ...]:
    """The solution grids of a split: 70 / 10 / 20 % of the 288 in hash order, for every seed the same."""
    order = sorted(all_grids(), key=lambda grid: stable_hash(f"sudoku/{grid}"))
    low, high = (round(share * len(order)) for share in _SHARES[split])
    return tuple(order[low:high])


def lazy_grid(puzzle: str) -> str:
    """Fill each blank with the smallest digit not yet in its row (clues included)."""
    filled = list(puzzle)
    for cell in CELLS:
        if filled[cell] == "0":
            row = filled[cell - cell % 4 : cell - cell % 4 + 4]
            # The three other cells leave at least one digit free.
            filled[cell] = min(set("1234") - set(row))
    return "".join(filled)


def forced_order(puzzle: str, solution: str) -> list[int]:
    """The blanks in an order in which each is forced by what stands before it, where possible.

    Forced: one digit is left for the cell, or the cell is the only one left for its digit in a row, column or
    box.
    If no cell is forced, the first blank in reading order comes next.
    """
    grid, order = list(puzzle), []
    while "0" in grid:
        blanks = [cell for cell in CELLS if grid[cell] == "0"]
        cell = next((cell for cell in blanks if _is_forced(grid, cell, solution[cell])), blanks[0])
        grid[cell] = solution[cell]
        order.append(cell)
    return order


def _is_forced(grid: list[str], cell: int, digit: str) -> bool:
    if _candidates(grid, cell) == {digit}:
        return True
    units = [unit for unit in UNITS if cell in unit]
    rivals = [[other for other in unit if other != cell and grid[other] == "0"] for unit in units]
    return any(all(digit not in _candidates(grid, other) for other in group) for group in rivals)


def _candidates(grid: list[str], cell: int) -> set[str]:
    return set("1234") - {grid[other] for unit in UNITS if cell in unit for other in unit}


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """4x4 sudoku puzzles with ``min_blanks``..``max_blanks`` blanks and one solution each.

    ``data`` (JSONL rows ``{"puzzle": "0..."}``) replaces the puzzles of every split; a solution is looked up.
    ``steps`` puts worked steps before the answer. Generated puzzles are distinct, never solved by the lazy
    policy, and splits share no solution grid. Fields: puzzle (16 characters, 0 = blank), solution (the first
    one; None if there is none) and a row's other columns. Raises ValueError.
    """

    seed: int = 0
    data: str | None = None
    train_size: int = 4096
    eval_size: int = 512
    prompt_style: str = "short"
    min_blanks: int = 8
    max_blanks: int = 12
    steps: bool = False

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("train_size", self.train_size, 1)
        check_range("eval_size", self.eval_size, 1)
        check_choice("prompt_style", self.prompt_style, PROMPT_STYLES)
        check_range("max_blanks", self.max_blanks, 1, MOST_BLANKS)
        check_range("min_blanks", self.min_blanks, 1, self.max_blanks)

    def examples(self, split: str) -> list[Example]:
        """The puzzles of a split. Raises ValueError for a bad row of ``data`` or too large a size."""
        check_choice("split", split, SPLITS)
        if self.data is not None:
            return list(_from_file(*file_stamp(self.data)))
        size = self.train_size if split == "train" else self.eval_size
        return list(_generate(split, self.seed, size, self.min_blanks, self.max_blanks))

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """One user message: ``sudoku`` and 16 digits, or an instruction for a general chat model."""
        puzzle = example.fields["puzzle"]
        if self.prompt_style == "short":
            return [{"role": "user", "content": " ".join(("sudoku", *puzzle))}]
        grid = "\n".join(" ".join(puzzle[row : row + 4]) for row in range(0, 16, 4))
        return [{"role": "user", "content": _INSTRUCT.format(grid=grid)}]

    def reference(self, example: Example) -> str | None:
        """``<answer> 1 2 3 4 ... </answer>``, after the worked steps if ``steps``; None if unsolvable."""
        puzzle, solution = example.fields["puzzle"], example.fields["solution"]
        if solution is None:
            return None
        return self._write(solution, forced_order(puzzle, solution) if self.steps else [])

    def lazy(self, example: Example) -> str:
        """The lazy grid in the same layout, its steps in reading order."""
        puzzle = example.fields["puzzle"]
        order = [cell for cell in CELLS if puzzle[cell] == "0"] if self.steps else []
        return self._write(lazy_grid(puzzle), order)

    def _write(self, grid: str, order: list[int]) -> str:
        steps = [f"{cell // 4 + 1} {cell % 4 + 1} = {grid[cell]} ;" for cell in order]
        return " ".join((*steps, "<answer>", *grid, "</answer>"))

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags."""
        return answer_spans(text)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the last answer is a valid grid that agrees with every clue."""
        grid = _read_grid(last_answer(text))
        if grid is None or not valid_grid(grid):
            return False
        return all(clue in ("0", digit) for clue, digit in zip(example.fields["puzzle"], grid, strict=True))

    @property
    def name(self) -> str:
        """The name that load knows."""
        return "sudoku"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rewards read."""
        return ("puzzle",)

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """{"correct": 1 if correct, "format": 0.1 if there is one answer block with 16 digits 1..4}."""
        return {"correct": self._correct_reward, "format": self._format_reward}

    def _correct_reward(self, example: Example, text: str) -> float:
        return float(self.correct(example, text))

    def _format_reward(self, example: Example, text: str) -> float:
        return 0.0 if _read_grid(only_answer(text)) is None else FORMAT_REWARD


def _read_grid(body: str | None) -> str | None:
    """The 16 digits of an answer, blanks and line ends ignored; None if it is anything else."""
    if body is None or len(body) > 1024:
        return None
    grid = "".join(body.split())
    return grid if len(grid) == 16 and set(grid) <= set("1234") else None


@lru_cache(maxsize=16)
def _generate(split: str, seed: int, size: int, min_blanks: int, max_blanks: int) -> tuple[Example, ...]:
    rng = random.Random(f"sudoku/{split}/{seed}")
    found: dict[str, str] = {}
    misses = 0
    while len(found) < size:
        grid, blanks = rng.choice(split_grids(split)), rng.randint(min_blanks, max_blanks)
        puzzle = next((new for new in _draw(grid, blanks, rng) if new not in found), None)
        misses = misses + 1 if puzzle is None else 0
        if puzzle is not None:
            found[puzzle] = grid
        if misses > _TRIES:
            raise ValueError(
                f"sudoku has only about {len(found)} {split} puzzles with {min_blanks}..{max_blanks} blanks, "
                f"{size} were asked for: lower the size or widen the range of blanks"
            )
    return tuple(_example(puzzle, grid) for puzzle, grid in found.items())


def _example(puzzle: str, grid: str) -> Example:
    return Example(id=f"sudoku-{puzzle}", fields={"puzzle": puzzle, "solution": grid})


def _draw(grid: str, blanks: int, rng: random.Random) -> Iterator[str]:
    """Up to _TRIES random puzzles of a grid that have one solution and are not solved by the lazy policy."""
    masks = [_agreement()[cell][grid[cell]] for cell in CELLS]
    cells = list(CELLS)
    for _ in range(_TRIES):
        clues = rng.sample(cells, 16 - blanks)
        mask = reduce(and_, [masks[cell] for cell in clues])
        if mask & (mask - 1):
            continue
        puzzle = "".join(grid[cell] if cell in clues else "0" for cell in cells)
        if lazy_grid(puzzle) != grid:
            yield puzzle


@lru_cache(maxsize=8)
def _from_file(path: str, _modified: int, _size: int) -> tuple[Example, ...]:
    return read_examples(path, _from_row)


def _from_row(where: str, row: dict[str, Any]) -> Example:
    puzzle = row.get("puzzle")
    if not isinstance(puzzle, str) or len(puzzle) != 16 or not set(puzzle) <= set("01234"):
        raise ValueError(f"{where}: got puzzle {puzzle!a:.60}, expected a string of 16 digits 0..4 (0 = blank)")
    return Example(id=where, fields={**row, "solution": next(iter(solutions(puzzle)), None)})
