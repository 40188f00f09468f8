"""Puzzles with one solution: 4x4 from the list of all grids, 9x9 by taking away cells that their
neighbours force.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from operator import and_

from unmaskrl.tasks.puzzles.sudoku_grids import (
    agreement,
    board,
    lazy_grid,
    search,
    split_grids,
    split_of,
)

_TRIES = 400
_DIGS = 40
Draw = Callable[[str, int, random.Random], Iterator[str]]


@lru_cache(maxsize=16)
def generate(
    side: int, split: str, seed: int, size: int, low: int, high: int
) -> tuple[tuple[str, str], ...]:
    """``size`` distinct (puzzle, solution) pairs of a split with low..high blanks. Raises
    ValueError if there are too few.
    """
    rng = random.Random(f"{'sudoku' if side == 4 else 'sudoku9'}/{split}/{seed}")
    draw: Draw = _draw_small if side == 4 else _draw_large
    found: dict[str, str] = {}
    misses = 0
    while len(found) < size:
        grid = _grid(side, split, rng)
        blanks = rng.randint(low, high)
        puzzle = next((new for new in draw(grid, blanks, rng) if new not in found), None)
        misses = misses + 1 if puzzle is None else 0
        if puzzle is not None:
            found[puzzle] = grid
        if misses > (_TRIES if side == 4 else _DIGS):
            raise ValueError(
                f"sudoku has only about {len(found)} {split} puzzles with {low}..{high} blanks, "
                f"{size} were asked for: lower the size or widen the range of blanks"
            )
    return tuple(found.items())


def _grid(side: int, split: str, rng: random.Random) -> str:
    if side == 4:
        return rng.choice(split_grids(split))
    while True:
        # The first row is free; the search fills the rest at random.
        row = "".join(rng.sample(board(9).digits, 9))
        grid = next(search(row + "0" * 72, rng))
        if split_of(grid) == split:
            return grid


def _draw_small(grid: str, blanks: int, rng: random.Random) -> Iterator[str]:
    """Up to _TRIES random puzzles of a grid that have one solution and are not solved by the lazy
    policy.
    """
    cells = list(range(16))
    masks = [agreement()[cell][grid[cell]] for cell in cells]
    for _ in range(_TRIES):
        clues = rng.sample(cells, 16 - blanks)
        mask = reduce(and_, [masks[cell] for cell in clues])
        if mask & (mask - 1):
            continue
        puzzle = "".join(grid[cell] if cell in clues else "0" for cell in cells)
        if lazy_grid(puzzle) != grid:
            yield puzzle


def _draw_large(grid: str, blanks: int, rng: random.Random) -> Iterator[str]:
    """Up to _DIGS random puzzles of a grid, solvable cell by forced cell and not solved by the lazy
    policy.
    """
    for _ in range(_DIGS):
        puzzle = dig(grid, blanks, rng)
        if puzzle is not None and lazy_grid(puzzle) != grid:
            yield puzzle


def dig(grid: str, blanks: int, rng: random.Random) -> str | None:
    """Blank cells in random order, each only if it stays forced; None if that ends before
    ``blanks`` cells.

    Forced: one digit is left for the cell, or no other blank of a row, column or box can hold its
    digit. Filling the cells in the opposite order is thus a proof that the solution is the only
    one. A cell that is not forced once never is later (clues only go), so one pass is enough.
    """
    own = board(9)
    digits = [int(digit) for digit in grid]
    puzzle = list(grid)
    left = blanks
    # How many clues among the peers of a cell hold each digit.
    seen = [[0] * 10 for _ in digits]
    for cell, digit in enumerate(digits):
        for other in own.peers[cell]:
            seen[other][digit] += 1
    for cell in rng.sample(range(81), 81):
        if not left:
            break
        digit = digits[cell]
        naked = seen[cell].count(0) == 2  # no clue holds 0, and none its own digit
        if not naked and not any(
            _stays_only(unit, cell, digit, puzzle, seen) for unit in own.units_of[cell]
        ):
            continue
        puzzle[cell] = "0"
        left -= 1
        for other in own.peers[cell]:
            seen[other][digit] -= 1
    return None if left else "".join(puzzle)


def _stays_only(
    unit: tuple[int, ...], cell: int, digit: int, puzzle: list[str], seen: list[list[int]]
) -> bool:
    """Whether no other blank of the unit could hold the digit once the cell is blank."""
    return all(other == cell or puzzle[other] != "0" or seen[other][digit] > 1 for other in unit)
