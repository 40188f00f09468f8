"""docs/extend.md: its code runs, and its parts pass their checkers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from unmaskrl import tasks
from unmaskrl.models.families import named_family
from unmaskrl.recipes.engines import make_rollouts
from unmaskrl.testing import check_estimator, check_family, check_rollouts, check_task

PAGE = (Path(__file__).parents[2] / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_task_of_the_page_keeps_the_contract(folder: Path) -> None:
    assert {"sums.py", "brief.py"} <= set(FILES)
    check_task(lambda: tasks.load("sums.py:Sums", highest=20))


def test_the_reward_of_the_page_is_a_reward(folder: Path) -> None:
    task = tasks.load("sums.py:Sums")
    examples = task.examples("test")[:2]
    functions = tasks.named_rewards("brief.py:brief", "train.reward_functions")
    grades = tasks.grade(task, examples, ["a" * 50, "a" * 5000], None, functions)
    assert grades.parts["brief.py:brief"] == [-0.05, -0.1]


def test_the_estimator_of_the_page_passes(folder: Path) -> None:
    scope: dict[str, Any] = {}
    exec(FILES["one_view.py"], scope)
    check_estimator(scope["one_view"], scale=0.5)


def test_the_family_of_the_page_passes(folder: Path) -> None:
    family = named_family("bag.py:family")
    assert family is not None
    check_family(family)


def test_the_engine_of_the_page_passes(folder: Path) -> None:
    check_rollouts(lambda den: make_rollouts({"name": "one_by_one.py:LeftToRight"}, den))
