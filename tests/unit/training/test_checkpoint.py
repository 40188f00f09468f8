"""Checkpoints are whole or passed over; an unreadable disk is neither; what was good is never
deleted for what is damaged.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from unmaskrl.training.folder import checkpoint
from unmaskrl.training.folder.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_latest,
    save_checkpoint,
    set_aside,
)


def write(folder: Path, update: int, keep: int = 2) -> Path:
    tensors = {
        "model": {"w": torch.full((4,), float(update))},
        "optimizer": {"w/step": torch.tensor(update)},
    }
    return save_checkpoint(folder, update, tensors, {"step": update, "x": 0.1 + 0.2}, keep=keep)


def whole(found: Checkpoint) -> Checkpoint:
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip_is_exact_and_old_ones_go(tmp_path: Path) -> None:
    for update in (3, 20, 100):
        write(tmp_path, update)
    assert names(tmp_path) == ["update-000020", "update-000100"]
    found = load_latest(tmp_path, whole)
    assert found.value is not None and found.notes == found.damaged == []
    assert found.value.state == {"step": 100, "x": 0.1 + 0.2}
    assert found.value.tensors["model"]["w"].equal(torch.full((4,), 100.0))


@pytest.mark.parametrize("keep", [1, 2, 5, 9])
def test_the_newest_ones_are_kept_and_none_is_dropped_before_there_are_so_many(
    tmp_path: Path, keep: int
) -> None:
    for update in range(1, 8):
        write(tmp_path, update, keep=keep)
        assert names(tmp_path) == [
            f"update-{n:06d}" for n in range(max(1, update - keep + 1), update + 1)
        ]


def flip(path: Path, where: int) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))


def edit_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def edit_state(path: Path, change) -> None:
    """Another state without the digest that would give it away."""
    state = json.loads((path / "state.json").read_text())
    state.pop("state_sha256")
    change(state)
    (path / "state.json").write_text(json.dumps(state))


DAMAGE = {
    "truncated": lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()[:-1]
    ),
    "a bit of a tensor": lambda p: flip(p / "model.safetensors", -3),
    "a bit of a name": lambda p: flip(p / "model.safetensors", 11),
    "a digit of the state": lambda p: (p / "state.json").write_text(
        (p / "state.json").read_text().replace('step": 2', 'step": 3')
    ),
    "half a state": lambda p: (p / "state.json").write_text('{"step": 2, "fi'),
    "no object": lambda p: (p / "state.json").write_text("[1]"),
    "no files": lambda p: edit_state(p, lambda s: s.pop("files")),
    "files of another type": lambda p: edit_state(
        p, lambda s: s.update(files={"model.safetensors": "x"})
    ),
    "a file outside": lambda p: edit_state(
        p, lambda s: s["files"].update({"../update-000001/model.safetensors": 80})
    ),
    "a missing file": lambda p: (p / "optimizer.safetensors").unlink(),
    "a file for a folder": lambda p: [(p / "state.json").unlink(), (p / "state.json").mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    DAMAGE[damage](newest)
    found = load_latest(tmp_path, whole)
    assert found.value is not None and found.value.state["step"] == 1
    assert (
        found.damaged == [newest]
        and len(found.notes) == 1
        and "update-000002 is damaged" in found.notes[0]
    )


def test_a_checkpoint_without_checksums_loads(tmp_path: Path) -> None:
    """Those of earlier versions: sizes only."""
    path = write(tmp_path, 1)
    edit_state(
        path, lambda s: s.update(files={name: about["bytes"] for name, about in s["files"].items()})
    )
    assert load_latest(tmp_path, whole).damaged == []


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyError("step"), TypeError("no"), AttributeError("no")]
)
def test_what_does_not_fit_is_passed_over_like_damage(error: Exception, tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)

    def older_only(found: Checkpoint) -> int:
        if found.state["step"] == 2:
            raise error
        return found.state["step"]

    assert load_latest(tmp_path, older_only).value == 1


def test_when_none_can_be_used_nothing_is_changed(tmp_path: Path) -> None:
    for update in (1, 2):
        flip(write(tmp_path, update) / "model.safetensors", -1)
    before = names(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"none of the 2 checkpoints .* can be used, nothing was changed .*SHA-256",
    ):
        load_latest(tmp_path, whole)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
)
def test_an_unreadable_disk_is_no_damage(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)

    def fail(path: Path) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "checksum", fail)
    with pytest.raises(OSError, match=error.strerror):
        load_latest(tmp_path, whole)


def test_damaged_newest_ones_never_cost_new_good_ones(tmp_path: Path) -> None:
    """Rotation counts what this run wrote or read: never the ones it passed over, whether they were
    set aside or not.
    """
    write(tmp_path, 1, keep=1)
    flip(write(tmp_path, 8, keep=2) / "model.safetensors", -1)
    found = load_latest(tmp_path, whole)
    assert found.value is not None and found.value.state["step"] == 1
    for update in (2, 3):
        write(tmp_path, update, keep=1)
    assert names(tmp_path) == ["update-000003", "update-000008"]
    assert set_aside(found.damaged) == ["update-000008 is kept as damaged-000008"]
    write(tmp_path, 9, keep=1)
    assert names(tmp_path) == ["damaged-000008", "update-000009"]
    flip(write(tmp_path, 8, keep=9) / "model.safetensors", -1)
    assert set_aside([tmp_path / "update-000008"]) == ["update-000008 is kept as damaged-000008-2"]


def test_failed_write_leaves_the_old_one_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="older ones are untouched"):
        write(tmp_path, 2)
    assert names(tmp_path) == ["update-000001"]


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written"):
        write(tmp_path / "gone" / "checkpoints", 1)
    assert not (tmp_path / "gone").exists()


def test_nothing_there(tmp_path: Path) -> None:
    found = load_latest(tmp_path / "none", whole)
    assert found.value is None and found.notes == []
