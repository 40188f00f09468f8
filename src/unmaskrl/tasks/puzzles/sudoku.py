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
    AnswerJudge,
    Example,
    Grade,
    check_range,
    file_stamp,
    read_examples,
)
from unmaskrl.tasks.d1 import d1_puzzles
from unmaskrl.tasks.math.answers import final_answer
from unmaskrl.tasks.math.wrapping import grid_digits
from unmaskrl.tasks.protocols import GeneratedTask, PublishedRules, RuledTask, StrictRules
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
class SudokuRules:
    """What both protocols share: references and lazy completions, each in its own layout.

    ``steps`` puts worked steps before the answer.
    """

    size: int
    steps: bool

    def reference(self, example: Example) -> str | None:
        """The solution, its steps in the order in which cells are forced; None if unsolvable."""
        puzzle = example.fields["puzzle"]
        solution = example.fields["solution"]
        if solution is None:
            return None
        return self._write(solution, forced_order(puzzle, solution) if self.steps else [])

    def lazy(self, example: Example) -> str:
        """The lazy grid, its steps in reading order."""
        puzzle = example.fields["puzzle"]
        order = [cell for cell, digit in enumerate(puzzle) if digit == "0"] if self.steps else []
        return self._write(lazy_grid(puzzle), order)

    def _write(self, grid: str, order: list[int]) -> str:
        cells = [(divmod(cell, self.size), grid[cell]) for cell in order]
        return self.layout([f"{r + 1} {c + 1} = {digit} ;" for (r, c), digit in cells], grid)

    def layout(self, steps: list[str], grid: str) -> str:
        """A completion of these steps and this answer."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StrictSudoku(SudokuRules, AnswerJudge[str], StrictRules):
    """Our rules: the last answer is a valid grid that agrees with every clue."""

    prompt_style: str

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """One user message: ``sudoku`` and 16 or 81 digits, or an instruction for a general chat
        model.
        """
        puzzle = example.fields["puzzle"]
        own = board(self.size)
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

    def layout(self, steps: list[str], grid: str) -> str:
        """``1 3 = 2 ; <answer> 1 2 3 4 ... </answer>``."""
        return " ".join((*steps, "<answer>", *grid, "</answer>"))

    def read(self, example: Example, body: str) -> str | None:
        """The 16 or 81 digits of an answer, whatever separates them but digits and letters; None if
        it is anything else.
        """
        body = final_answer(body)
        if len(body) > 1024:
            return None
        grid = grid_digits(body)
        return (
            grid
            if len(grid) == self.size**2 and set(grid) <= set(board(self.size).digits)
            else None
        )

    def solves(self, example: Example, answer: str) -> bool:
        """Whether the grid is valid and keeps the clues."""
        return valid_grid(answer) and agrees(example.fields["puzzle"], answer)


@dataclass(frozen=True, kw_only=True)
class PublishedSudoku(SudokuRules, PublishedRules):
    """d1's rules: {"score": share of blanks right} as in its training, the verdict of its
    evaluation.
    """

    few_shot: int

    def in_split(self, example: Example, split: str) -> Example:
        """The example with its split, which chooses the prompt. Raises ValueError."""
        if "0" not in example.fields["puzzle"]:
            raise ValueError(
                f"{example.id}: got a puzzle without blanks, which protocol d1 never counts as "
                "right: leave it out"
            )
        return d1_puzzles.with_split(example, split)

    def prompt(self, example: Example) -> list[dict[str, str]]:
        """Rules, worked examples, the puzzle; evaluation starts the answer with ``<reasoning>``."""
        trains = d1_puzzles.trains(example)
        return d1_puzzles.sudoku_prompt(example.fields["puzzle"], self.few_shot, trains)

    def layout(self, steps: list[str], grid: str) -> str:
        """A completion in the published format."""
        return d1_puzzles.layout("\n".join(steps), grid)

    def cells(self, example: Example, grid: str | None) -> tuple[int, int]:
        """(blanks filled right, blanks) of a grid that was read."""
        puzzle = example.fields["puzzle"]
        solution = example.fields["solution"]
        return (
            (0, puzzle.count("0"))
            if solution is None
            else d1_puzzles.sudoku_cells(grid, puzzle, solution)
        )

    def grade(self, example: Example, text: str) -> Grade:
        """The reward of training; right if evaluation finds every blank right."""
        right, blanks = self.cells(example, d1_puzzles.sudoku_training_grid(text))
        score = right / blanks if blanks else 0.0
        found, wanted = self.cells(example, d1_puzzles.sudoku_evaluation_grid(text))
        return Grade(found == wanted > 0, {"score": score})


@dataclass(frozen=True, kw_only=True)
class Sudoku(GeneratedTask, RuledTask[StrictSudoku | PublishedSudoku]):
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

    name = "sudoku"

    data: str | None = None
    size: int = 4
    min_blanks: int | None = None
    max_blanks: int | None = None
    steps: bool = False
    few_shot: int = 0

    def __post_init__(self) -> None:
        GeneratedTask.__post_init__(self)
        if self.size not in SIZES or isinstance(self.size, bool):
            raise ValueError(
                f"size is {self.size!r}, expected 4 or 9 (rows of the grid; train_size counts "
                "puzzles)"
            )
        low, high = self._blanks
        check_range("max_blanks", high, 1, MOST_BLANKS[self.size])
        check_range("min_blanks", low, 1, high)
        RuledTask.__post_init__(self)
        check_range("few_shot", self.few_shot, 0, 3)
        published = isinstance(self.rules, PublishedSudoku)
        if published and self.size != 4:
            raise ValueError("protocol d1 is published for 4x4 only: set size 4 or protocol strict")
        if not published and self.few_shot:
            raise ValueError(
                f"few_shot is {self.few_shot}, but only the prompts of protocol d1 have examples: "
                "set it to 0"
            )

    def _protocols(self) -> dict[str, StrictSudoku | PublishedSudoku]:
        return {
            "strict": StrictSudoku(
                size=self.size, steps=self.steps, prompt_style=self.prompt_style
            ),
            "d1": PublishedSudoku(size=self.size, steps=self.steps, few_shot=self.few_shot),
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that ``grade`` reads."""
        published = isinstance(self.rules, PublishedSudoku)
        return ("puzzle", "solution") if published else ("puzzle",)

    def examples(self, split: str) -> list[Example]:
        """The puzzles of a split. Raises ValueError for a bad row of ``data`` or too large a
        size.
        """
        size = self.size_of(split)
        found = (
            _generate(self.size, split, self.seed, size, *self._blanks)
            if self.data is None
            else _from_file(self.size, *file_stamp(self.data))
        )
        return [self.rules.in_split(example, split) for example in found]

    def lazy(self, example: Example) -> str:
        """The lazy grid in the same layout, its steps in reading order."""
        return self.rules.lazy(example)

    def cells(self, example: Example, text: str) -> tuple[int, int]:
        """(blanks filled right, blanks) as d1's evaluation counts them; its figure pools both sums
        over the puzzles.
        """
        published = PublishedSudoku(size=self.size, steps=self.steps, few_shot=self.few_shot)
        return published.cells(example, d1_puzzles.sudoku_evaluation_grid(text))

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
