"""What `unmaskrl init` writes runs as it is: checked, trained on, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import rounded
from tests.integration.test_commands import TINY, run
from unmaskrl import tasks
from unmaskrl.testing import check_task
from unmaskrl.utils.imports import load_object


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    code, said = run(capsys, "init", str(tmp_path / "own"))
    assert code == 0, said
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own"


def test_it_is_checked_trained_on_and_evaluated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = run(capsys, "check", "recipe.yaml")
    assert code == 0 and "own_task.py:Largest" in said and "warning" not in said, said
    settings = [s for s in TINY if not s.startswith(("decode.", "train.steps"))]
    code, said = run(capsys, "train", "recipe.yaml", *settings, "train.steps=1")
    assert code == 0, said
    (row,) = (
        json.loads(line) for line in Path("runs/recipe-s0/metrics.jsonl").read_text().splitlines()
    )
    # the base writes well-formed answers, whose first number is one of the three
    assert 0 < row["reward/own_reward.py:near"] <= 0.3 and row["reward/format"] > 0
    assert "unmaskrl eval runs/recipe-s0 --task own_task.py:Largest" in said
    words = ["--task", "own_task.py:Largest", "--size", "8", "--threads", "1"]
    code, said = run(capsys, "eval", "runs/recipe-s0", *words)
    assert code == 0, said


def test_its_task_and_its_reward_do_what_they_say(folder: Path) -> None:
    check_task(load_object("own_task.py:Largest", "task"))
    task = tasks.load("own_task.py:Largest", highest=9)
    example = tasks.Example(id="0", fields={"numbers": [2, 8, 4]})
    texts = ["<answer> 8 - 4 </answer>", "8 <answer> 4 </answer>", "<answer> 9 </answer>", "8"]
    functions = tasks.named_rewards("own_reward.py:near", "train.reward_functions")
    grades = tasks.grade(task, [example] * 4, texts, None, functions)
    assert grades.correct == [True, False, False, False]
    near = grades.parts["own_reward.py:near"]
    assert near[:2] == [rounded(0.3), rounded(0.15)] and near[2:] == [0, 0]
