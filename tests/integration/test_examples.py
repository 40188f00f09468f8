"""The examples run as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.test_commands import TINY, run

# whatever is decoded, every group has better and worse rows
REWARD = "def in_turn(completions, **columns): return [i % 2 for i in range(len(completions))]\n"
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_estimator_is_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EXAMPLES / "own_estimator", tmp_path / "examples" / "own_estimator")
    (tmp_path / "in_turn.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    recipe = "examples/own_estimator/recipe.yaml"
    code, said = run(capsys, "check", recipe)
    assert code == 0 and "own_estimator.py:block_elbo" in said, said
    settings = [s for s in TINY if not s.startswith("train.steps")]
    settings += ["train.steps=1", "train.reward_functions=[in_turn.py:in_turn]", "run.out=run"]
    settings.append("task.train_size=100")
    code, said = run(capsys, "train", recipe, *settings)
    assert code == 0, said
    (row,) = (json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines())
    assert row["grad_norm"] > 0 and row["ratio/max_dev"] > 0
