"""Tasks: problems with a verifiable answer. No torch; the extras datasets and math-verify are
imported where needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from unmaskrl.tasks.base import (
    AnswerTask,
    BaseTask,
    Example,
    Grade,
    LazyTask,
    Task,
    TrlReward,
    nearest,
)
from unmaskrl.tasks.custom import Jsonl
from unmaskrl.tasks.functions import load_function
from unmaskrl.tasks.gym.reasoning_gym import ReasoningGym
from unmaskrl.tasks.math.gsm8k import GSM8K
from unmaskrl.tasks.math.mathematics import MathProblems
from unmaskrl.tasks.puzzles.countdown import Countdown
from unmaskrl.tasks.puzzles.sudoku import Sudoku
from unmaskrl.tasks.rewards import (
    BatchTask,
    CallContext,
    Grades,
    TrainerState,
    as_trl_reward,
    call_trl_rewards,
    completion_text,
    grade,
    trl_reward_parts,
)
from unmaskrl.tasks.sandbox.guard import Guard

TASKS: dict[str, Callable[..., Task]] = {
    "countdown": Countdown,
    "sudoku": Sudoku,
    "gsm8k": GSM8K,
    "math": MathProblems,
    "reasoning_gym": ReasoningGym,
    "jsonl": Jsonl,
}


def load(name: str, **kwargs: Any) -> Task:
    """Build the task ``name`` with its keyword arguments, e.g. ``load("countdown", numbers=3)``.

    Raises ValueError for an unknown task or keyword (naming the nearest one) or a value out of
    range.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    known = list(inspect.signature(TASKS[name]).parameters)
    for key in kwargs:
        if key not in known:
            raise ValueError(f"task {name!r} has no setting {key!r}: {nearest(key, known)}")
    return TASKS[name](**kwargs)


__all__ = [
    "GSM8K",
    "TASKS",
    "AnswerTask",
    "BaseTask",
    "BatchTask",
    "CallContext",
    "Countdown",
    "Example",
    "Grade",
    "Grades",
    "Guard",
    "Jsonl",
    "LazyTask",
    "MathProblems",
    "ReasoningGym",
    "Sudoku",
    "Task",
    "TrainerState",
    "TrlReward",
    "as_trl_reward",
    "call_trl_rewards",
    "completion_text",
    "grade",
    "load",
    "load_function",
    "trl_reward_parts",
]
