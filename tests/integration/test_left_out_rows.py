"""Rows without advantage are left out where that is exact: the weights are those of a step that
scored them all.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmaskrl.models.hub import ASSETS
from unmaskrl.recipes.load import load_recipe

train_module = importlib.import_module("unmaskrl.training.loop")
TINY = (
    "train.steps=1 train.prompts_per_step=6 train.group_size=4 train.num_iterations=2 "
    "run.threads=1 run.log_with=[] run.probe=false task.train_size=200 "
    "eval.size=2 eval.size_during=2"
).split()


@pytest.mark.parametrize(
    "loss",
    [["loss.normaliser=group"], ["loss.name=sequence_clip"], ["loss.name=reinforce"]],
    ids=str,
)
def test_leaving_out_flat_groups_changes_nothing(
    loss: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> tuple[dict, dict]:
        recipe = load_recipe(
            "sudoku-mini", [*TINY, *loss, "loss.kl_coef=0.0", f"run.out={tmp_path / name}"]
        )
        train_module.train(recipe)
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        return load_file(tmp_path / name / "model-raw" / "model.safetensors"), row

    left_out, few = run("left-out")
    monkeypatch.setattr(train_module, "trained_rows", lambda run, live: torch.arange(len(live)))
    whole, all_rows = run("whole")
    assert (
        few["groups/used_rows"] < all_rows["groups/used_rows"] == 24 and few["groups/used_rows"] > 0
    )
    assert few["calls/score"] < all_rows["calls/score"]
    base = load_file(ASSETS / "mini" / "model.safetensors")
    assert max(float((left_out[k] - base[k]).abs().max()) for k in base) > 1e-5
    assert max(float((left_out[k] - whole[k]).abs().max()) for k in base) < 1e-6


def test_with_a_kl_term_every_row_counts(tmp_path: Path) -> None:
    recipe = load_recipe("sudoku-mini", [*TINY, "loss.kl_coef=0.01", f"run.out={tmp_path / 'run'}"])
    train_module.train(recipe)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["groups/used_rows"] == 24 and row["groups/live"] < 1
