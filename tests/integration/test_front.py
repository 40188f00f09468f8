"""u.train is the command's own run: settings by name, callables as rewards, a short repr."""

from __future__ import annotations

from pathlib import Path

import pytest

import unmaskrl as u

TINY = {
    "train.steps": 1,
    "train.prompts_per_step": 2,
    "train.group_size": 2,
    "train.num_iterations": 1,
    "decode.steps": 4,
    "eval.size": 2,
    "eval.size_during": 2,
    "run.threads": 1,
    "run.probe": False,
    "run.log_with": [],
    "optimizer.lr": 1e-05,
}


def test_a_run_with_a_callable_as_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def shorter(prompts: list[object], completions: list[object], **_: object) -> list[float]:
        seen.append(len(completions))
        return [1.0] * len(completions)

    out = tmp_path / "run"
    changes = {**TINY, "run.out": str(out)}
    summary = u.train("sudoku-mini", rewards=[shorter], **changes)
    assert sum(seen) >= 4 and (out / "report.html").is_file()
    assert repr(summary).startswith("Summary(accuracy ") and str(out) in repr(summary)
    assert "held-out" in capsys.readouterr().out
    longer = u.train(str(out), resume=True, quiet=True, rewards=[shorter], **{"train.steps": 2})
    assert longer["steps"] == 2 and capsys.readouterr().out == ""


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.stepz"):
        u.train("sudoku-mini", **{"train.stepz": 1, "run.out": str(tmp_path / "run")})
