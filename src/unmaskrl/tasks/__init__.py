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
from unmaskrl.tasks.errors import place_of, tell_errors, told
from unmaskrl.tasks.functions import load_function, named_rewards
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
from unmaskrl.utils.imports import is_outside, load_object

TASKS: dict[str, Callable[..., Task]] = {
    "countdown": Countdown,
    "sudoku": Sudoku,
    "gsm8k": GSM8K,
    "math": MathProblems,
    "reasoning_gym": ReasoningGym,
    "jsonl": Jsonl,
}


def load(name: str, **settings: Any) -> Task:
    """Build a task with its settings, e.g. ``load("countdown", numbers=3)``.

    ``name``: a shipped task, or ``package.module:factory`` or ``path/to/file.py:factory`` of your
    own, whose keyword arguments are the settings. Raises ValueError for an unknown name or setting
    (naming the nearest one), a value out of range, or a factory whose result is no task.
    """
    if not is_outside(name) and name not in TASKS:
        raise ValueError(f"unknown task {name!r}: {nearest(name, TASKS)}")
    factory = load_object(name, "task") if is_outside(name) else TASKS[name]
    parameters = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in settings:
        if key not in parameters and not takes_all:
            raise ValueError(f"task {name!r} has no setting {key!r}: {nearest(key, parameters)}")
    return checked_task(factory(**settings), name)


def checked_task(found: Any, name: str) -> Task:
    """What a factory returned, if it is a task. Raises ValueError, naming what it lacks."""
    members = [member for member in vars(Task) if not member.startswith("_")]
    missing = [member for member in members if not hasattr(found, member)]
    if getattr(type(found), "grade", None) is BaseTask.grade:
        missing.append("grade")
    if missing:
        raise ValueError(
            f"task {name!r}: the factory returned a {type(found).__name__} without "
            f"{', '.join(missing)}; subclass unmaskrl.tasks.BaseTask or AnswerTask and write "
            "examples, prompt, reference and the judge"
        )
    return found


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
    "checked_task",
    "completion_text",
    "grade",
    "load",
    "load_function",
    "named_rewards",
    "place_of",
    "tell_errors",
    "told",
    "trl_reward_parts",
]
