"""Trackers get the settings, the metrics and the samples, and a resumed run continues its own."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from unmaskrl.recipes.load import load_recipe
from unmaskrl.training import trackers
from unmaskrl.training.loop import train
from unmaskrl.training.trackers import check_trackers

TINY = (
    "train.steps=1 train.prompts_per_step=2 train.group_size=2 train.num_iterations=1 eval.size=2 "
    "eval.size_during=2 eval.every=1 run.threads=1 run.probe=false decode.steps=4 "
    "decode.exit_at=0.5"
).split()


def tiny(out: Path, *more: str) -> Any:
    return load_recipe("sudoku-mini", [*TINY, f"run.out={out}", *more])


def test_a_missing_tracker_stops_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(
        ValueError, match=r"wandb is not installed; pip install 'unmaskrl\[wandb\]'"
    ):
        train(tiny(tmp_path / "run", "run.log_with=[wandb]"))
    assert list(tmp_path.iterdir()) == []
    check_trackers(["tensorboard"])


def test_tensorboard_has_settings_metrics_and_samples(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    out = tmp_path / "run"
    train(tiny(out))
    train(tiny(out, "train.steps=2"), resume=True)
    (folder,) = {path.parent for path in (out / "tensorboard").rglob("events.out.tfevents.*")}
    assert folder.name == "unmaskrl"
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2]
    texts = {
        tag: [
            event.tensor_proto.string_val[0].decode()
            for event in events.Tensors(f"{tag}/text_summary")
        ]
        for tag in ("config", "samples")
    }
    assert "group_size: 2" in texts["config"][0]
    assert "| step | split | id | prompt |" in texts["samples"][-1]
    shown = [line for line in texts["samples"][-1].splitlines() if line.startswith("| 2 |")]
    assert shown and all("sudoku" in line.lower() or "test" in line for line in shown)


class Recorder:
    """Stands in for wandb: what it was started with, and all that it was given."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int | None]] = []

    def module(self) -> types.ModuleType:
        module = types.ModuleType("wandb")

        def init(**options: Any) -> Any:
            self.started.append(options)
            return run

        def log(values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self.logged.append((values, step))

        run = types.SimpleNamespace(id="abc", log=log, finish=lambda: None)
        settings = types.SimpleNamespace(update=lambda values, **_: self.config.update(values))
        vars(module).update(
            init=init,
            run=run,
            config=settings,
            Table=lambda columns, data, dataframe=None: {"columns": columns, "data": data},
        )
        return module


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder.module())
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    more = ["run.log_with=[wandb]", "run.project=mine", "run.tags=[a,b]", "run.group=g"]
    out = tmp_path / "run"
    train(tiny(out, *more))
    train(tiny(out, *more, "train.steps=2"), resume=True)
    first, second = recorder.started
    assert first == {"project": "mine", "name": "run", "group": "g", "tags": ["a", "b"]}
    assert second == {**first, "id": "abc", "resume": "allow"}
    assert json.loads((out / "trackers.json").read_text()) == {"wandb": "abc"}
    assert recorder.config["train.group_size"] == 2 and recorder.config["decode.steps"] == 4
    steps = [step for values, step in recorder.logged if "reward/mean" in values]
    assert steps == [1, 2]
    tables = [values["samples"] for values, _ in recorder.logged if "samples" in values]
    assert all(table["columns"] == list(trackers.COLUMNS) for table in tables)
    splits = {row[1] for table in tables for row in table["data"]}
    assert {"train", "test-base", "test-raw"} <= splits
