"""What a finished run leaves: one model folder without an average, adapters as run.save says,
each of them a MODEL.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unmaskrl.cli.main import main
from unmaskrl.models.loading import open_checkpoint
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.loop import train

SETTINGS = (
    "train.steps=1 train.prompts_per_step=2 train.group_size=4 train.num_iterations=1 "
    "run.threads=1 run.log_with=[] "
    "eval.size=4 eval.size_during=4 train.ema=0 "
    "optimizer.lr=0.01 optimizer.warmup=0 run.probe=false task.train_size=20"
).split()


def run(out: Path, *settings: str) -> Path:
    train(load_recipe("sudoku-mini", [*SETTINGS, *settings, f"run.out={out}"]))
    return out


def test_without_an_average_there_is_one_model_folder(tmp_path: Path) -> None:
    out = run(tmp_path / "run")
    assert (out / "model" / "model.safetensors").is_file() and not (out / "model-raw").exists()


def test_an_adapter_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three ways hold the same model; eval takes the run's folder, and its figures are those of
    the run's own end.
    """
    runs = {
        save: run(tmp_path / save, "model.lora.rank=4", f"run.save={save}")
        for save in ("adapter", "merged", "both")
    }
    files = {save: {p.name for p in (out / "model").iterdir()} for save, out in runs.items()}
    assert "adapter_config.json" in files["adapter"] and "config.json" not in files["adapter"]
    assert "config.json" in files["merged"] and "adapter" not in files["merged"]
    assert {"config.json", "adapter"} <= files["both"]
    weights = {save: open_checkpoint(out)[0].model.state_dict() for save, out in runs.items()}
    for name, value in weights["merged"].items():
        torch.testing.assert_close(weights["adapter"][name], value, rtol=1e-6, atol=1e-6)
        assert weights["both"][name].equal(value)
    inside = open_checkpoint(runs["both"] / "model" / "adapter")[0].model.state_dict()
    assert all(inside[name].equal(value) for name, value in weights["adapter"].items())
    out = tmp_path / "eval.json"
    words = [
        "eval",
        str(runs["adapter"]),
        "--task",
        "sudoku",
        "--size",
        "4",
        "--threads",
        "1",
        "--json",
        str(out),
    ]
    assert main(words) == 0
    after = json.loads((runs["adapter"] / "summary.json").read_text())["after"]["raw"]
    assert json.loads(out.read_text())["accuracy"] == after["accuracy"], (
        "decode.json is read beside the adapter"
    )
    capsys.readouterr()
    newest = sorted((runs["adapter"] / "checkpoints").glob("update-*"))[-1]
    assert main(["eval", str(newest), "--task", "sudoku", "--size", "4", "--threads", "1"]) == 2
    assert (
        "is a checkpoint, for --resume alone; give the model of a finished run, "
        f"{runs['adapter'] / 'model'}" in (capsys.readouterr().err)
    )


def test_a_checkpoint_that_could_not_be_written_is_said_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with --quiet, and by the exit code: the run is complete, but it could not be made
    longer.
    """

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("checkpoint x could not be written (No space left on device)")

    monkeypatch.setattr("unmaskrl.training.saving.save_run", full)
    code = main(["train", "sudoku-mini", *SETTINGS, f"run.out={tmp_path / 'run'}", "--quiet"])
    said = capsys.readouterr()
    assert code == 2
    assert (
        "unmaskrl: warning: checkpoint x could not be written (No space left on device)\n"
        in said.err
    )
    assert "unmaskrl: error: the run is complete, but checkpoint x could not be written" in said.err
    assert (
        "Held-out accuracy" in said.out
        and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    )
    assert f"next: unmaskrl eval {tmp_path / 'run'} --task sudoku" in said.out


def test_a_checkpoint_by_minutes(tmp_path: Path) -> None:
    """save_every=100 would write none inside this run; the third of a millisecond is over at every
    update.
    """
    out = run(
        tmp_path / "run",
        "run.save_every=100",
        "run.save_minutes=1e-6",
        "train.num_iterations=3",
    )
    names = sorted(path.name for path in (out / "checkpoints").glob("update-*"))
    assert names == ["update-000002", "update-000003"]
