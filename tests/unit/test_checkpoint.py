"""Checkpoints are whole or passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unmaskrl import checkpoint
from unmaskrl.checkpoint import load_latest, save_checkpoint


def write(folder: Path, update: int, keep: int = 2) -> Path:
    tensors = {"model": {"w": torch.full((4,), float(update))}, "optimizer": {"w/step": torch.tensor(update)}}
    return save_checkpoint(folder, update, tensors, {"step": update, "x": 0.1 + 0.2}, keep=keep)


def test_round_trip_is_exact_and_old_ones_go(tmp_path: Path) -> None:
    for update in (3, 20, 100):
        write(tmp_path, update)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["update-000020", "update-000100"]
    loaded, notes = load_latest(tmp_path)
    assert loaded is not None and not notes
    assert loaded.state == {"step": 100, "x": 0.1 + 0.2}
    assert loaded.tensors["model"]["w"].equal(torch.full((4,), 100.0))


@pytest.mark.parametrize("damage", ["truncate", "state", "missing"])
def test_damaged_newest_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    if damage == "truncate":
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    elif damage == "state":
        (newest / "state.json").write_text('{"step": 2, "fi')
    else:
        (newest / "optimizer.safetensors").unlink()
    loaded, notes = load_latest(tmp_path)
    assert loaded is not None and loaded.state["step"] == 1
    assert len(notes) == 1 and "update-000002" in notes[0]


def test_failed_write_leaves_the_old_one_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="older ones are untouched"):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["update-000001"]


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") == (None, [])
