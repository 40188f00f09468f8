"""The shipped base can be made again: its recipe reproduces the first logged losses, and a
resumed run is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from unmaskrl.models.hub import ASSETS
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.schema import SFTRecipe
from unmaskrl.training.sft import run_sft


def test_the_first_ten_steps_reproduce_the_logged_loss(tmp_path: Path) -> None:
    """Same data, masks and weights; sums may differ in the last bits between machines, hence
    1e-3.
    """
    run_sft(load_recipe("mini-base", [f"run.out={tmp_path / 'run'}"], SFTRecipe), stop_at=10)
    ours = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [
        json.loads(line) for line in (ASSETS / "mini" / "log.jsonl").read_text().splitlines()
    ][:1]
    assert [row["step"] for row in ours] == [row["step"] for row in logged] == [10]
    for a, b in zip(ours, logged, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_interrupted_sft_resumes_exactly(tmp_path: Path) -> None:
    small = [
        "train.steps=12",
        "run.save_every=5",
        "run.log_every=1",
        "data.0.num_examples=200",
        "data.1.num_examples=200",
    ]
    small += ["data.0.batch_size=8", "data.1.batch_size=8"]
    runs = {
        name: load_recipe("mini-base", [*small, f"run.out={tmp_path / name}"], SFTRecipe)
        for name in "ab"
    }
    run_sft(runs["a"])
    run_sft(runs["b"], stop_at=8)
    run_sft(runs["b"], resume=True)
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(ours[k].equal(theirs[k]) for k in ours)
