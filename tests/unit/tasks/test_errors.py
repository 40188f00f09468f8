"""What a task's methods raise is one line, however the task object is made."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from unmaskrl.tasks import LazyTask, tell_errors


class Plain:
    name = "broken"

    def examples(self, split: str) -> list[str]:
        return [split]

    @staticmethod
    def prompt(example: str) -> str:
        raise KeyError(example)

    def lazy(self, example: str) -> str:
        return example


@dataclass(frozen=True, slots=True)
class Slots:
    name: str = "broken"

    def examples(self, split: str) -> list[str]:
        return [split]

    @staticmethod
    def prompt(example: str) -> str:
        raise KeyError(example)

    def lazy(self, example: str) -> str:
        return example


def namespace() -> SimpleNamespace:
    own = Plain()
    return SimpleNamespace(name="broken", examples=own.examples, prompt=own.prompt, lazy=own.lazy)


@pytest.mark.parametrize("made", [Plain, Slots, namespace])
def test_every_kind_of_object_tells(made: Any) -> None:
    task = made()
    tell_errors(task)
    assert task.examples("test") == ["test"] and task.lazy("x") == "x"
    with pytest.raises(ValueError, match=r"task broken: prompt raised .*: KeyError: 'x'"):
        task.prompt("x")
    assert isinstance(task, LazyTask) == isinstance(made(), LazyTask)


def test_only_this_object_does() -> None:
    tell_errors(Slots())
    with pytest.raises(KeyError):
        Slots().prompt("x")
