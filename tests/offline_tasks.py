"""Every task offline: a handful of problems written for these tests, as JSONL files in a temporary
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unmaskrl import tasks

GSM8K_ROWS = [
    {
        "question": f"A baker packs {boxes} boxes with {rolls} rolls each and sells {sold} rolls. "
        "How many rolls are left?",
        "answer": f"{boxes} boxes hold {boxes} * {rolls} = "
        f"<<{boxes}*{rolls}={boxes * rolls}>>{boxes * rolls} rolls.\n"
        f"{boxes * rolls} - {sold} = {boxes * rolls - sold} are left.\n#### "
        f"{boxes * rolls - sold:,}",
    }
    for boxes in range(4, 40, 4)
    for rolls in (7, 12, 150)
    for sold in (5, 11)
]
MATH_ROWS = [
    {
        "problem": f"What is the smaller solution of $x^2 - {a + b}x + {a * b} = 0$, divided by "
        f"${c}$?",
        "solution": f"The solutions are ${a}$ and ${b}$. So the answer is "
        f"$\\boxed{{\\frac{{{a}}}{{{c}}}}}$.",
        "level": f"Level {1 + a % 5}",
    }
    for a in range(1, 7)
    for b in (8, 11, 13)
    for c in (17, 19)
]
CHAT_ROWS = [
    {"prompt": f"numbers {n} {n + 1}", "answer": str(2 * n + 1), "level": n % 3} for n in range(40)
]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSONL file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def offline_task(name: str, folder: Path, **settings: Any) -> tasks.Task:
    """A task by name with problems in all three splits, without the network."""
    if name in ("countdown", "sudoku", "reasoning_gym"):
        return tasks.load(name, **{"train_size": 20, "eval_size": 10, **settings})
    rows = {"gsm8k": GSM8K_ROWS, "math": MATH_ROWS, "jsonl": CHAT_ROWS}[name]
    extra = {"verifier": "number"} if name == "jsonl" and "reward" not in settings else {}
    return tasks.load(
        name, **{"data": write_rows(folder / f"{name}.jsonl", rows), **extra, **settings}
    )
