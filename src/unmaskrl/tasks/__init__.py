"""Tasks: problems with a verifiable answer. Standard library only; no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from unmaskrl.tasks.base import Example, Task, as_trl_reward, call_trl_rewards, nearest, trl_reward_parts
from unmaskrl.tasks.countdown import Countdown
from unmaskrl.tasks.guard import Guard
from unmaskrl.tasks.reasoning_gym import ReasoningGym
from unmaskrl.tasks.sudoku import Sudoku

TASKS: dict[str, type[Any]] = {"countdown": Countdown, "sudoku": Sudoku, "reasoning_gym": ReasoningGym}


def load(name: str, **kwargs: Any) -> Task:
    """Build the task ``name`` with its keyword arguments, e.g. ``load("countdown", numbers=3)``.

    Raises ValueError for an unknown task or keyword (naming the nearest one) or a value out of range.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    known = [field.name for field in fields(TASKS[name])]
    for key in kwargs:
        if key not in known:
            raise ValueError(f"task {name!r} has no setting {key!r}: {nearest(key, known)}")
    return TASKS[name](**kwargs)


__all__ = [
    "TASKS",
    "Countdown",
    "Example",
    "Guard",
    "ReasoningGym",
    "Sudoku",
    "Task",
    "as_trl_reward",
    "call_trl_rewards",
    "load",
    "trl_reward_parts",
]
