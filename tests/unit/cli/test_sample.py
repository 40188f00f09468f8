"""What `unmaskrl sample` says of a completion."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmaskrl.cli.main import main

TASK = """
from dataclasses import dataclass

from unmaskrl.tasks import BaseTask, Example, Grade


@dataclass(frozen=True, kw_only=True)
class Styled(BaseTask):
    name = "styled"

    def examples(self, split):
        return [Example(id=split, fields={})]

    def prompt(self, example):
        return [{"role": "user", "content": "numbers 1 2 target 3"}]

    def reference(self, example):
        return None

    def grade(self, example, text):
        return Grade(False, {"correct": 0.0, "style": 0.25, "length": 0.5})
"""


def test_the_reward_is_the_sum_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong answer may earn something, in training and here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "styled.py").write_text(TASK)
    words = ["sample", "mini", "--task", "styled.py:Styled", "--threads", "1"]
    assert main([*words, "decode.gen_length=4", "decode.steps=4", "decode.block_length=4"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "correct: no" in said
    assert "reward 0.75 (correct 0, style 0.25, length 0.5)" in said
