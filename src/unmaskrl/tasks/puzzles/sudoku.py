"""Sudoku of 4x4 or 9x9 cells: rows, columns and boxes each hold every digit once.

The generators are ours: splits are disjoint by solution grid (for 9x9 up to the names of the
digits), which reasoning-gym's does not offer (nor does it leave out lazy solutions), and worked
steps exist for every puzzle. Every valid grid that agrees with the clues counts as correct, also
where a puzzle from a file has several.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from unmaskrl.tasks.base import (
    FORMAT_REWARD,
    PROMPT_STYLES,
    PROTOCOLS,
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
)
from unmaskrl.tasks.d1 import d1_puzzles
from unmaskrl.tasks.math.answers import final_answer
from unmaskrl.tasks.math.wrapping import grid_digits
from unmaskrl.tasks.puzzles.sudoku_grids import (
    SIZES,
    agrees,
    board,
    forced_order,
    lazy_grid,
    search,
    solutions,
    valid_grid,
)
from unmaskrl.tasks.puzzles.sudoku_puzzles import generate

# Default range of blanks, and the most: 4 clues are the fewest that make a 4x4 puzzle unique; 9x9
# puzzles whose cells are forced one after the other are seldom found with more than 50 blanks.
BLANKS = {4: (8, 12), 9: (30, 45)}
MOST_BLANKS = {4: 12, 9: 50}

_INSTRUCT = (
    "Here is a {size} by {size} sudoku, read row by row from the top left; 0 marks an empty "
    "cell:\n\n{grid}\n\n"
    "Fill every empty cell so that each row, each column and each {box} by {box} box holds "
    "{digits} once. "
    "Keep the given digits as they are. First work out the cells one at a time, writing each "
    "step as "
    "`row column = digit ;`. Then give all {cells} digits, row by row and separated by blanks, "
    "inside "
    "<answer></answer>, with nothing else between the tags."
)


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """Sudoku puzzles of ``size`` x ``size`` cells with ``min_blanks``..``max_blanks`` blanks and
    one solution each.

    None: 8..12 blanks for 4x4, 30..45 for 9x9, whose cells are forced one after the other. ``data``
    (JSONL rows ``{"puzzle": "0..."}``, or the published columns Puzzle and Solution) replaces the
    puzzles of every split; a solution that is not given is searched for. ``steps`` puts worked
    steps before the answer. Generated puzzles are distinct, never solved by the lazy policy, and
    splits share no solution grid (9x9: nor one that differs in the names of digits). ``protocol``:
    "strict", or "d1" (4x4 only) for the published prompts with ``few_shot`` worked examples (0..3),
    reward and parser, with their quirks (docs/tasks.md). Fields: puzzle (16 or 81 characters, 0 =
    blank), solution (the first one), under d1 split, and a row's other columns. Raises ValueError.
    """

    seed: int = 0
    data: str | None = None
    train_size: int = 4096
    eval_size: int = 512
    prompt_style: str = "short"
    size: int = 4
    min_blanks: int | None = None
    max_blanks: int | None = None
    steps: bool = False
    protocol: str = "strict"
    few_shot: int = 0

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0)
        check_range("train_size", self.train_size, 1)
        check_range("eval_size", self.eval_size, 1)
        check_choice("prompt_style", self.prompt_style, PROMPT_STYLES)
        if self.size not in SIZES or isinstance(self.size, bool):
            raise ValueError(
                f"size is {self.size!r}, expected 4 or 9 (rows of the grid; train_size counts "
                "puzzles)"
            )
        low, high = self._blanks
        check_range("max_blanks", high, 1, MOST_BLANKS[self.size])
        check_range("min_blanks", low, 1, high)
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_range("few_shot", self.few_shot, 0, 3)
        if self.protocol == "d1" and self.size != 4:
            raise ValueError("protocol d1 is published for 4x4 only: set size 4 or protocol strict")
        if self.protocol != "d1" and self.few_shot:
            raise ValueError(
                f"few_shot is {self.few_shot}, but only the prompts of protocol d1 have examples: "
                "set it to 0"
            )

    def examples(self, split: str) -> list[Example]:
        """The puzzles of a split. Raises ValueError for a bad row of ``data`` or too large a
        size.
        """
        check_choice("split", split, SPLITS)
        size = self.train_size if split == "train" else self.eval_size
        found = (
            _generate(self.size, split, self.seed, size, *self._blanks)
            if self.data is None
            else _from_file(self.size, *file_stamp(self.data))
        )
        if self.protocol == "strict":
            return list(found)
        for example in found:
            if "0" not in example.fields["puzzle"]:
                raise ValueError(
                    f"{example.id}: got a puzzle without blanks, which protocol d1 never counts as "
                    "right: leave it out"
                )
        return [d1_puzzles.with_split(example, split) for example in found]

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """One user message: ``sudoku`` and 16 or 81 digits, or an instruction for a general chat
        model.

        Under d1, evaluation (validation, test) starts the answer with ``<reasoning>``, as
        published.
        """
        puzzle = example.fields["puzzle"]
        own = board(self.size)
        if self.protocol == "d1":
            return d1_puzzles.sudoku_prompt(puzzle, self.few_shot, d1_puzzles.trains(example))
        if self.prompt_style == "short":
            return [{"role": "user", "content": " ".join(("sudoku", *puzzle))}]
        grid = "\n".join(
            " ".join(puzzle[row : row + self.size]) for row in range(0, len(puzzle), self.size)
        )
        digits = f"{', '.join(own.digits[:-1])} and {own.digits[-1]}"
        content = _INSTRUCT.format(
            size=self.size, box=own.box, cells=len(puzzle), digits=digits, grid=grid
        )
        return [{"role": "user", "content": content}]

    def reference(self, example: Example) -> str | None:
        """``<answer> 1 2 3 4 ... </answer>``, after the worked steps if ``steps``; None if
        unsolvable.
        """
        puzzle = example.fields["puzzle"]
        solution = example.fields["solution"]
        if solution is None:
            return None
        return self._write(solution, forced_order(puzzle, solution) if self.steps else [])

    def lazy(self, example: Example) -> str:
        """The lazy grid in the same layout, its steps in reading order."""
        puzzle = example.fields["puzzle"]
        order = [cell for cell, digit in enumerate(puzzle) if digit == "0"] if self.steps else []
        return self._write(lazy_grid(puzzle), order)

    def _write(self, grid: str, order: list[int]) -> str:
        steps = [
            f"{cell // self.size + 1} {cell % self.size + 1} = {grid[cell]} ;" for cell in order
        ]
        if self.protocol == "d1":
            return d1_puzzles.layout("\n".join(steps), grid)
        return " ".join((*steps, "<answer>", *grid, "</answer>"))

    def answer_spans(self, text: str) -> list[tuple[int, int]]:
        """Character spans (start, end) of the insides of the answer tags."""
        return answer_spans(text)

    def correct(self, example: Example, text: str) -> bool:
        """Whether the last answer is a valid grid that agrees with every clue; d1: its evaluation
        finds every blank right.
        """
        if self.protocol == "d1":
            right, blanks = self.cells(example, text)
            return right == blanks > 0
        grid = self._read_grid(last_answer(text))
        return grid is not None and valid_grid(grid) and agrees(example.fields["puzzle"], grid)

    def cells(self, example: Example, text: str) -> tuple[int, int]:
        """(blanks filled right, blanks) as d1's evaluation counts them; its figure pools both sums
        over the puzzles.
        """
        return self._cells(example, d1_puzzles.sudoku_evaluation_grid(text))

    def _cells(self, example: Example, grid: str | None) -> tuple[int, int]:
        puzzle = example.fields["puzzle"]
        solution = example.fields["solution"]
        return (
            (0, puzzle.count("0"))
            if solution is None
            else d1_puzzles.sudoku_cells(grid, puzzle, solution)
        )

    @property
    def name(self) -> str:
        """The name that load knows."""
        return "sudoku"

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that rewards read."""
        return ("puzzle",) if self.protocol == "strict" else ("puzzle", "solution")

    @property
    def rewards(self) -> dict[str, RewardPart]:
        """{"correct": 1 if correct, "format": 0.1 for one block with all digits}; d1: {"score":
        share of blanks right}.
        """
        if self.protocol == "d1":
            return {"score": self._published_reward}
        return {"correct": self._correct_reward, "format": self._format_reward}

    def _correct_reward(self, example: Example, text: str) -> float:
        return float(self.correct(example, text))

    def _format_reward(self, example: Example, text: str) -> float:
        return 0.0 if self._read_grid(only_answer(text)) is None else FORMAT_REWARD

    def _published_reward(self, example: Example, text: str) -> float:
        right, blanks = self._cells(example, d1_puzzles.sudoku_training_grid(text))
        return right / blanks if blanks else 0.0

    def _read_grid(self, body: str | None) -> str | None:
        """The 16 or 81 digits of an answer, whatever separates them but digits and letters; None if
        it is anything else.
        """
        if body is None:
            return None
        body = final_answer(body)
        if len(body) > 1024:
            return None
        grid = grid_digits(body)
        return (
            grid
            if len(grid) == self.size**2 and set(grid) <= set(board(self.size).digits)
            else None
        )

    @property
    def _blanks(self) -> tuple[int, int]:
        """The range of blanks; a bound that is not set is the size's own, or the other one where
        that lies beyond it.
        """
        low, high = BLANKS[self.size]
        if self.max_blanks is not None:
            high = self.max_blanks
        elif isinstance(self.min_blanks, int):
            high = max(high, self.min_blanks)
        if self.min_blanks is not None:
            return self.min_blanks, high
        return (min(low, high) if isinstance(high, int) else low), high


@lru_cache(maxsize=16)
def _generate(
    size: int, split: str, seed: int, count: int, low: int, high: int
) -> tuple[Example, ...]:
    pairs = generate(size, split, seed, count, low, high)
    return tuple(
        Example(id=f"sudoku-{puzzle}", fields={"puzzle": puzzle, "solution": grid})
        for puzzle, grid in pairs
    )


@lru_cache(maxsize=8)
def _from_file(size: int, path: str, _modified: int, _bytes: int) -> tuple[Example, ...]:
    return read_examples(path, lambda where, row: _from_row(size, where, row))


def _from_row(size: int, where: str, row: dict[str, Any]) -> Example:
    """A row with puzzle, or with the columns Puzzle and Solution of d1's sudoku files; both as
    texts (0 may come first).
    """
    puzzle = row.get("puzzle", row.get("Puzzle"))
    digits = board(size).digits
    cells = size**2
    last = digits[-1]
    if not isinstance(puzzle, str) or len(puzzle) != cells or not set(puzzle) <= {"0", *digits}:
        raise ValueError(
            f"{where}: got puzzle {puzzle!a:.60}, expected a string of {cells} digits 0..{last} (0 "
            "= blank)"
        )
    solution = row.get("solution", row.get("Solution"))
    if solution is None:
        try:
            solution = next(iter(solutions(puzzle) if size == 4 else search(puzzle)), None)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if solution is None:
            raise ValueError(
                f"{where}: puzzle {puzzle} has no solution: correct it or leave it out"
            )
    elif (
        not isinstance(solution, str)
        or not valid_grid(solution)
        or len(solution) != cells
        or not agrees(puzzle, solution)
    ):
        raise ValueError(
            f"{where}: got solution {solution!a:.90}, expected a valid grid of {cells} digits that "
            "keeps the clues"
        )
    return Example(id=where, fields={**row, "puzzle": puzzle, "solution": solution})
