"""The examples run as they are."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import unmaskrl as u
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


def executed(path: Path, scope: dict[str, Any]) -> list[Any]:
    """What each code cell of a notebook shows at its end, None if that is nothing."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = []
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == [], "outputs are not stored"
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, cell {number}", "exec"), scope)
        shown.append(None)
        if isinstance(last, ast.Expr):
            line = ast.Expression(last.value)
            shown[-1] = eval(compile(line, f"{path.name}, cell {number}", "eval"), scope)
    return shown


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    shown = executed(EXAMPLES / "first_steps.ipynb", scope)
    html = [one._repr_html_() for one in shown if isinstance(one, u.Rollout)]
    assert len(html) == 2 and ", 20 calls" in html[0] and "underline" in html[1]
    assert isinstance(shown[2], u.Grade) and scope["text"] in capsys.readouterr().out
    calls = scope["calls"]
    assert calls[False, False] == 20 and calls[False, True] == 15
    assert calls[True, True] < calls[True, False] < 20
    assert len(scope["result"].items) == 32 and scope["bold"].decode["exit_at"] == 0.5
    lines = Path("runs/first-steps/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert scope["summary"]["steps"] == len(rows) == 2 and "Summary(" in repr(scope["summary"])
    assert Path(scope["summary"]["report"]).samefile("runs/first-steps/report.html")
    assert all(0 < row["reward/right_cells"] < 0.5 for row in rows)
    assert isinstance(shown[-1], u.EvalResult) and len(shown[-1].items) == 32
