"""Every parser and reward against hostile completions: finite, in range, never right by accident,
fast, and small.

A task is covered by one line in TASKS_UNDER_TEST: (name, factory, least and greatest sum of its
rewards).
"""

from __future__ import annotations

import importlib.util
import math
import random
import resource
import time
from collections.abc import Callable
from functools import lru_cache

import pytest

from unmaskrl.tasks import Countdown, Example, ReasoningGym, Sudoku, Task

COUNT = 10_000
# Every 50th of them where some texts run into the time limit, each of which costs that limit and a
# new worker.
THINNED = {"gym-spiral_matrix": 50, "gym-polynomial": 50}
FEWER_GIANTS = {"gym-polynomial": 8}  # its package takes seconds over some
SMALL = {"train_size": 8, "eval_size": 8}
Row = tuple[str, Callable[[], Task], float, float]
TASKS_UNDER_TEST: list[Row] = [
    ("countdown-3", lambda: Countdown(**SMALL), 0.0, 1.1),
    ("countdown-4", lambda: Countdown(numbers=4, **SMALL), 0.0, 1.1),
    ("countdown-d1", lambda: Countdown(protocol="d1", **SMALL), 0.0, 1.0),
    ("sudoku-4", lambda: Sudoku(**SMALL), 0.0, 1.1),
    ("sudoku-9", lambda: Sudoku(size=9, **SMALL), 0.0, 1.1),
    ("sudoku-d1", lambda: Sudoku(protocol="d1", **SMALL), 0.0, 1.0),
]
GYM: list[Row] = [
    ("gym-chain_sum", lambda: ReasoningGym(dataset="chain_sum", **SMALL), 0.0, 1.1),
    ("gym-mini_sudoku", lambda: ReasoningGym(dataset="mini_sudoku", **SMALL), 0.0, 1.1),
    ("gym-word_sorting", lambda: ReasoningGym(dataset="word_sorting", **SMALL), 0.0, 1.1),
    # Scored by eval of the text, and by sympy's parser, which is eval as well.
    (
        "gym-spiral_matrix",
        lambda: ReasoningGym(dataset="spiral_matrix", seconds=0.5, **SMALL),
        0.0,
        1.1,
    ),
    (
        "gym-polynomial",
        lambda: ReasoningGym(dataset="polynomial_multiplication", seconds=0.5, **SMALL),
        0.0,
        1.1,
    ),
]
if importlib.util.find_spec("reasoning_gym") is not None:
    TASKS_UNDER_TEST += GYM

# CPU time of all rewards and the verdict on one text in this process (what other processes do to
# the clock does not count), and growth of its peak memory.
SECONDS = 1.0
# Ten times the characters may take ten times as long, with a margin; a quadratic judge takes a
# hundred times. Below FLOOR seconds a measured time is noise.
GROWTH = 40
FLOOR = 0.02
MEGABYTES = 400
MILLION = 10**6

PIECES = [
    "<answer>", "</answer>", "<answer>", "</answer>", "<answer", "</answer", "<Answer>",
    "answer>", "<reasoning>",
    "</reasoning>", "9**9**9", "2**-1", "7//2", "1" * 5000, "-" * 50, "(" * 300, ")" * 300,
    "(" * 16 + "1" + ")" * 16,
    "1+" * 40, "0/0", "1/0", "3*7+12", "=33", "1e999", "nan", "-inf", "0x10", "1_000", "1,234",
    "012", ".5", "1.", "3.7",
    "#### 42", "$5", "5%", "1234341221434321", "3214142323414132", "123456789" * 9, "1 2 3 4 ",
    "0" * 16, "5" * 81,
    r"\boxed{", r"\boxed{3*7+12}", r"\boxed 1$", r"\fbox{", r"\frac{1}{2}", r"\frac",
    r"\sqrt[3]{", r"\left(", "}", "{",
    "$$", r"\times", r"\div", "^{\\circ}", "```", "```\n1234\n```", "<|endoftext|>", "<|eot_id|>",
    "x**2 + 3*x",
    "[[1,2],[3,4]]", "__import__('os').system('true')", "eval('1')", "exec('x=1')",
    "().__class__.__bases__", "lambda: 0",
    "raise", "{}", "%s", "%n", "\x00", "\ud800", "\udfff", "\u202e", "\u2066",
    "\u0661\u0662\u0663", "\uff13", "\u00b2",
    "\u00bd", "\u4e09", "e\u0301", "\U0001f600", "\ufeff", "\u2028", "\x0b", "\x1c", "\r\n", "\n",
    "\t", " ", "'", '"',
    "\\", "\\u0000",
]  # fmt: skip


def around(body: str) -> str:
    return f"<answer>{body}</answer>"


@lru_cache(maxsize=1)
def completions() -> tuple[str, ...]:
    """Every piece as an answer, then mixtures: of pieces, of pieces in tags, and of single
    characters.
    """
    rng = random.Random(0)
    characters = [chr(code) for code in (*range(128), 0x661, 0xFF13, 0x202E, 0xD800, 0x1F600)]
    texts = [around(piece) for piece in PIECES]
    while len(texts) < COUNT:
        kind = rng.random()
        pool = characters if kind < 0.2 else PIECES
        text = "".join(rng.choices(pool, k=rng.randint(0, 12)))
        texts.append(around(text) if kind > 0.6 else text)
    return tuple(texts)


def giants(size: int) -> list[str]:
    """About ``size`` characters each."""
    bombs = [
        "(" * size + "1" + ")" * size, "[" * size, "{" * size, "-" * size,
        "1+" * (size // 2) + "1",
        "9" * size, "9" * (size // 10), " " * size, "1" + " " * size + "x", "\n" * size,
        "\x00" * size,
        "\ud800" * size, "\u0663" * size, "a" * size, "1 " * (size // 2),
        "1=" * (size // 2),
        "1x" * (size // 2), "`" * size, "``` " * (size // 4),
        "```" + " 1" * (size // 2), "\\" * size,
        "9**" * (size // 3) + "9", "\u202e" * size,
        r"\frac{1}{" * (size // 10) + "2" + "}" * (size // 10),
        r"\boxed{" * (size // 10) + "2" + "}" * (size // 10), r"\boxed{" * (size // 10),
        r"\boxed " * (size // 10),
        r"\sqrt{" * (size // 10),
        "<|endoftext|>" * (size // 10), "1234" * (size // 4), "0." * (size // 2),
    ]  # fmt: skip
    tags = [
        "<answer>" * (size // 10),
        "</answer>" * (size // 10),
        "<answer></answer>" * (size // 20),
        "</answer><answer>" * (size // 20),
    ]
    tags += [
        "<answer>" * (size // 20) + "</answer>" * (size // 20),
        "<answer>1" * (size // 10),
        "<reasoning>" * (size // 10),
        "<" * size,
    ]
    # Inside one block, and after an answer.
    return [*map(around, bombs), *(around("1") + bomb for bomb in bombs[::3]), *tags]


def right_elsewhere(task: Task, example: Example, text: str) -> bool:
    """Whether a text holds the known solution, so that a verdict of right is no accident."""
    wanted = {example.fields.get("solution"), example.fields.get("answer")} - {None}
    return any(str(solution).replace(" ", "") in text.replace(" ", "") for solution in wanted)


def throw(task: Task, example: Example, text: str, low: float, high: float) -> float:
    """All parts and the verdict on one text; the CPU seconds they took."""
    start = time.process_time()
    grade = task.grade(example, text)
    parts = list(grade.parts.values())
    spans = task.answer_spans(text)
    seconds = time.process_time() - start
    assert all(isinstance(part, float) and math.isfinite(part) for part in parts), ascii(text[:200])
    assert low <= sum(parts) <= high + 1e-9, (parts, ascii(text[:200]))
    assert grade.correct is False or right_elsewhere(task, example, text), ascii(text[:200])
    assert all(0 <= begin <= end <= len(text) for begin, end in spans[:100])
    return seconds


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
    ("name", "factory", "low", "high"), TASKS_UNDER_TEST, ids=[row[0] for row in TASKS_UNDER_TEST]
)
def test_ten_thousand_hostile_completions(
    name: str, factory: Callable[[], Task], low: float, high: float
) -> None:
    task = factory()
    example = task.examples("test")[0]
    reference = task.reference(example)
    throw(task, example, "", low, high)
    before = peak_megabytes()
    assert len(completions()) >= COUNT
    slowest = max(
        throw(task, example, text, low, high) for text in completions()[:: THINNED.get(name, 1)]
    )
    assert slowest < SECONDS
    assert peak_megabytes() - before < MEGABYTES
    # The last word is a right answer: nothing that came before has broken the judge.
    assert reference is not None and task.grade(example, reference).correct


@pytest.mark.parametrize(
    ("name", "factory", "low", "high"), TASKS_UNDER_TEST, ids=[row[0] for row in TASKS_UNDER_TEST]
)
def test_time_grows_with_the_characters_and_no_faster(
    name: str, factory: Callable[[], Task], low: float, high: float
) -> None:
    task = factory()
    example = task.examples("test")[0]
    throw(task, example, "", low, high)
    every = FEWER_GIANTS.get(name, 1)
    pairs = list(zip(giants(MILLION // 10)[::every], giants(MILLION)[::every], strict=True))
    before = peak_megabytes()
    for tenth, text in pairs:
        short = throw(task, example, tenth, low, high)
        seconds = throw(task, example, text, low, high)
        assert seconds < GROWTH * max(short, FLOOR), (short, seconds, ascii(text[:60]))
    assert peak_megabytes() - before < MEGABYTES
