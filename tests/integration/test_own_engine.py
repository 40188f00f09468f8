"""A rollout engine from a file outside the package trains, evaluates and samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unmaskrl.cli.main import main
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.loop import train
from unmaskrl.training.setup import start_run

SMALL = (
    "train.steps=2 train.prompts_per_step=2 train.group_size=2 train.num_iterations=1 "
    "run.threads=1 run.log_with=[] eval.size=2 eval.size_during=2 eval.every=1 "
    "decode.select=left_to_right decode.exit_at=null prior.name=none"
).split()
REWARD = """def letters(completions, **kwargs):
    return [sum(i * ord(c) for i, c in enumerate(str(text))) % 97 / 97 for text in completions]
"""


def test_a_run_on_an_engine_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "engine_of_mine.py"
    shutil.copyfile(Path(__file__).parents[1] / "own_engine.py", source)
    (tmp_path / "letters_of_mine.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    engine = f"rollouts.name={source}:LeftToRight"
    changes = [
        *SMALL,
        engine,
        f"run.out={tmp_path / 'run'}",
        "train.reward_functions=[letters_of_mine:letters]",
    ]
    recipe = load_recipe("sudoku-mini-elbo", changes)
    train(recipe)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0 and rows[0]["health/behavior_gap"] < 1e-4
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    steps = json.loads(samples[0])["decoded_step"]
    assert steps == list(range(1, len(steps) + 1))  # left to right, as it stands in that file
    again = load_recipe("sudoku-mini-elbo", [*changes, f"run.out={tmp_path / 'again'}"])
    run = start_run(again, resume=False, force=False)
    assert type(run.rollouts).__name__ == "LeftToRight"
    settings = ["decode.select=left_to_right", "decode.exit_at=null", engine]
    for command in (
        ["eval", str(tmp_path / "run"), "--task", "sudoku", "--size", "2", *settings],
        ["sample", str(tmp_path / "run"), "--task", "sudoku", *settings],
        ["prior", "mini", "--task", "sudoku", "--size=2", f"--out={tmp_path / 'p'}", *settings],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert main(["eval", "mini", "--task", "sudoku", "--size", "2", engine]) == 2
    assert "one token per call" in capsys.readouterr().err
