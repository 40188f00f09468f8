"""What the user's own code raises, in one line that names the place."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from unmaskrl.tasks import contained

_OWN_FOLDER = Path(__file__).parent
# What a task is asked for, but ``grade``, which is told where it is called: rewards.grade.
_ASKED = ("examples", "prompt", "reference", "answer_spans", "reward_prompt", "lazy")


def place_of(error: BaseException, skipped: Collection[str] = (contained.__file__,)) -> str:
    """ "file:line: Type: message" of the last line that is not in the ``skipped`` files."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename not in skipped]
    where = f"{theirs[-1].filename}:{theirs[-1].lineno}: " if theirs else ""
    return where + (f"{type(error).__name__}: {error}".splitlines() or [""])[0]


@contextmanager
def told(task: str, what: str, hint: str = "") -> Iterator[None]:
    """Any exception of a task's method ``what`` as a ValueError of one line.

    A ValueError of our own tasks is meant for the user and stays as it is.
    """
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, ValueError) and Path(last).is_relative_to(_OWN_FOLDER):
            raise
        raise ValueError(f"task {task}: {what} raised {place_of(error)}{hint}") from error


def tell_errors(task: Any) -> None:
    """Put ``told`` around the methods of one task object, for all who ask it from now on."""
    methods = {what: getattr(task, what, None) for what in _ASKED}
    telling = {k: _telling(task.name, k, method) for k, method in methods.items() if method}
    if hasattr(task, "__dict__"):
        for what, method in telling.items():
            object.__setattr__(task, what, method)
        return
    # slots take no attributes: such a task gets a class of its own
    kind = type(task)
    members = {what: staticmethod(method) for what, method in telling.items()}
    own = type(kind.__name__, (kind,), {"__slots__": (), "__module__": kind.__module__, **members})
    object.__setattr__(task, "__class__", own)


def _telling(task: str, what: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def asked(*args: Any, **kwargs: Any) -> Any:
        with told(task, what):
            return method(*args, **kwargs)

    return asked
