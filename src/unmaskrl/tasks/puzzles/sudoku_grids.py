"""Sudoku grids of 4x4 and 9x9 cells as strings of digits, row by row, 0 = blank: what is valid,
forced, solvable.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import permutations
from math import isqrt
from operator import and_

from unmaskrl.tasks.base import stable_hash

SIZES = (4, 9)
# A puzzle of a file whose search is longer is refused; hard 9x9 puzzles take some thousand guesses.
MAX_GUESSES = 200_000
_SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}


@dataclass(frozen=True, slots=True)
class Board:
    """``size`` x ``size`` cells in boxes of ``box`` x ``box``; units are rows, columns and boxes,
    peers share one.
    """

    size: int
    box: int
    digits: str
    units: tuple[tuple[int, ...], ...]
    units_of: tuple[tuple[tuple[int, ...], ...], ...]
    peers: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=2)
def board(size: int) -> Board:
    """The board of 4 or 9."""
    box = isqrt(size)
    cells = range(size * size)
    side = range(size)
    square = [row * size + column for row in range(box) for column in range(box)]
    corners = [row * size + column for row in range(0, size, box) for column in range(0, size, box)]
    units = (
        *(tuple(range(size * row, size * row + size)) for row in side),
        *(tuple(range(column, size * size, size)) for column in side),
        *(tuple(corner + offset for offset in square) for corner in corners),
    )
    units_of = tuple(tuple(unit for unit in units if cell in unit) for cell in cells)
    peers = tuple(
        tuple(sorted({other for unit in units_of[cell] for other in unit} - {cell}))
        for cell in cells
    )
    return Board(size, box, "123456789"[:size], units, units_of, peers)


def board_of(grid: Sequence[str]) -> Board:
    """The board whose cells a grid fills: 16 or 81."""
    return board(isqrt(len(grid)))


def valid_grid(grid: str) -> bool:
    """Whether 16 or 81 characters fill rows, columns and boxes with every digit once."""
    if len(grid) not in (16, 81):
        return False
    own = board_of(grid)
    return all({grid[cell] for cell in unit} == set(own.digits) for unit in own.units)


def agrees(puzzle: str, grid: str) -> bool:
    """Whether a grid keeps every clue."""
    return all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))


def lazy_grid(puzzle: str) -> str:
    """Fill each blank with the smallest digit not yet in its row (clues included)."""
    filled = list(puzzle)
    own = board_of(puzzle)
    for cell in range(len(puzzle)):
        if filled[cell] == "0":
            start = cell - cell % own.size
            # The other cells leave at least one digit free.
            filled[cell] = min(set(own.digits) - set(filled[start : start + own.size]))
    return "".join(filled)


def candidates(puzzle: Sequence[str]) -> list[int]:
    """Per cell a bit mask of the digits (1 << digit) that no peer holds; 0 for a filled cell."""
    own = board_of(puzzle)
    every = sum(1 << int(digit) for digit in own.digits)
    held = [0 if digit == "0" else 1 << int(digit) for digit in puzzle]
    taken = [
        reduce(int.__or__, (held[other] for other in own.peers[cell]))
        for cell in range(len(puzzle))
    ]
    return [0 if held[cell] else every & ~taken[cell] for cell in range(len(puzzle))]


def forced_order(puzzle: str, solution: str) -> list[int]:
    """The blanks in an order in which each is forced by what stands before it, where possible.

    Forced: one digit is left for the cell, or the cell is the only one left for its digit in a row,
    column or box. If no cell is forced, the first blank in reading order comes next.
    """
    own = board_of(puzzle)
    masks = candidates(puzzle)
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    order = []
    bits = [1 << int(digit) for digit in solution]
    while blanks:
        cell = next(
            (cell for cell in blanks if _is_forced(own, masks, cell, bits[cell])), blanks[0]
        )
        masks[cell] = 0
        for other in own.peers[cell]:
            masks[other] &= ~bits[cell]
        blanks.remove(cell)
        order.append(cell)
    return order


def _is_forced(own: Board, masks: list[int], cell: int, bit: int) -> bool:
    if masks[cell] == bit:
        return True
    return any(
        not any(masks[other] & bit for other in unit if other != cell)
        for unit in own.units_of[cell]
    )


@lru_cache(maxsize=1)
def all_grids() -> tuple[str, ...]:
    """The 288 solution grids of 4x4 in lexicographic order."""
    rows = ["".join(row) for row in permutations("1234")]
    pairs = [top + bottom for top in rows for bottom in rows if _disjoint_boxes(top, bottom)]
    return tuple(upper + lower for upper in pairs for lower in pairs if valid_grid(upper + lower))


def _disjoint_boxes(top: str, bottom: str) -> bool:
    return len(set(top[:2] + bottom[:2])) == 4 and len(set(top[2:] + bottom[2:])) == 4


@lru_cache(maxsize=1)
def agreement() -> tuple[dict[str, int], ...]:
    """Per cell of 4x4: digit -> bit mask of the grids (in the order of all_grids) that have it
    there.
    """
    grids = all_grids()
    return tuple(
        {
            digit: sum(1 << i for i, grid in enumerate(grids) if grid[cell] == digit)
            for digit in "1234"
        }
        for cell in range(16)
    )


def solutions(puzzle: str) -> list[str]:
    """All grids that agree with the clues of a 4x4 puzzle (16 characters, 0 = blank)."""
    masks = [agreement()[cell][digit] for cell, digit in enumerate(puzzle) if digit != "0"]
    mask = reduce(and_, masks, (1 << len(all_grids())) - 1)
    return [grid for index, grid in enumerate(all_grids()) if mask >> index & 1]


@lru_cache(maxsize=3)
def split_grids(split: str) -> tuple[str, ...]:
    """The 4x4 solution grids of a split: 70 / 10 / 20 % of the 288 in hash order, for every seed
    the same.
    """
    order = sorted(all_grids(), key=lambda grid: stable_hash(f"sudoku/{grid}"))
    low, high = (round(share * len(order)) for share in _SHARES[split])
    return tuple(order[low:high])


def relabelled(grid: str) -> str:
    """The grid with its digits renamed so that the first row is 1, 2, 3, ...: the same for all
    grids that differ by names.
    """
    own = board_of(grid)
    return grid.translate(str.maketrans(grid[: own.size], own.digits))


def split_of(grid: str) -> str:
    """The split of a 9x9 solution grid by its relabelled form, for every seed the same: 70 / 10 /
    20 %.
    """
    share = stable_hash(f"sudoku9/{relabelled(grid)}") % 10 / 10
    return next(split for split, (low, high) in _SHARES.items() if low <= share < high)


def search(puzzle: str, rng: random.Random | None = None) -> Iterator[str]:
    """The grids that agree with the clues, by depth-first search: the cell with the fewest digits
    left first.

    Digits are tried in order, or in an order drawn from ``rng``. Raises ValueError after
    MAX_GUESSES guesses.
    """
    own = board_of(puzzle)
    grid = list(puzzle)
    guesses = 0
    if any(
        digit != "0" and digit in {puzzle[other] for other in own.peers[cell]}
        for cell, digit in enumerate(puzzle)
    ):
        return
    # Each entry: the masks before a guess, its cell, and the digits not tried yet.
    stack: list[tuple[list[int], int, list[int]]] = []
    masks = candidates(puzzle)
    while True:
        cell = _tightest(grid, masks)
        if cell is None:
            yield "".join(grid)
        else:
            digits = [int(digit) for digit in own.digits if masks[cell] >> int(digit) & 1]
            if rng is not None:
                rng.shuffle(digits)
            stack.append((masks, cell, digits))
        while stack and not stack[-1][2]:
            grid[stack.pop()[1]] = "0"
        if not stack:
            return
        guesses += 1
        if guesses > MAX_GUESSES:
            raise ValueError(
                f"puzzle {puzzle}: no end of the search after {MAX_GUESSES} guesses; give its "
                "solution"
            )
        before, cell, digits = stack[-1]
        digit = digits.pop(0)
        grid[cell] = str(digit)
        masks = before.copy()
        masks[cell] = 0
        for other in own.peers[cell]:
            masks[other] &= ~(1 << digit)


def _tightest(grid: list[str], masks: list[int]) -> int | None:
    """The blank with the fewest digits left; None if there is no blank."""
    best = None
    fewest = 10
    for cell, mask in enumerate(masks):
        if grid[cell] == "0" and (left := mask.bit_count()) < fewest:
            best = cell
            fewest = left
            if left < 2:
                break
    return best
