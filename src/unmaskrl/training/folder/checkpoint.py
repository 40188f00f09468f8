"""Checkpoints that are whole or not there: safetensors plus one JSON state, written aside and
renamed.

A checkpoint folder ``update-000040`` holds one safetensors file per tensor group and
``state.json``, which lists size and SHA-256 of every file, and a digest of itself. The loader takes
the newest folder that is whole and fits what it is for, and says which ones it had to pass over; a
disk that cannot be read is no damage: that error is raised.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...utils.files import checksum, json_text, sync

STATE = "state.json"
_NAME = re.compile(r"update-\d{6,}")
_DIGEST = "state_sha256"
# what a state that lacks a key, or has one of another type, raises on its way into a run
_UNFIT = (ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError)
T = TypeVar("T")


class CheckpointError(ValueError):
    """Checkpoints exist and none can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensor groups by name, and everything else."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class Found(Generic[T]):
    """What was read from the newest checkpoint that can be used (None: there is none at all), and
    the damaged newer ones.
    """

    value: T | None
    checkpoint: Checkpoint | None
    damaged: list[Path]
    notes: list[str]


def save_checkpoint(
    folder: Path,
    update: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``folder/update-NNNNNN`` and drop the older ones but for ``keep - 1``; OSError leaves
    them untouched.

    Newer ones cannot be of this run's past (``set_aside``): they are never counted. The folder's
    own parent has to be there.
    """
    final = folder / f"update-{update:06d}"
    partial = folder / f".partial-{update:06d}"
    try:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, group in tensors.items():
            # clones: tensors that share memory are refused by safetensors
            save_file(
                {k: v.detach().clone().contiguous() for k, v in group.items()},
                partial / f"{name}.safetensors",
            )
        _write_state(partial, state)
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); the older ones are untouched"
        ) from None
    older = [path for path in checkpoint_paths(folder) if _number(path) < update]
    for path in older[: max(0, len(older) - (keep - 1))]:
        _remove(path)
    return final


def checkpoint_paths(folder: Path) -> list[Path]:
    """All checkpoints, oldest first, damaged or not."""
    return sorted(
        (path for path in folder.glob("update-*") if _NAME.fullmatch(path.name)), key=_number
    )


def load_latest(folder: Path, accept: Callable[[Checkpoint], T]) -> Found[T]:
    """What ``accept`` makes of the newest checkpoint that is whole and that it does not refuse; a
    line about each newer one.

    CheckpointError if checkpoints exist and none will do; OSError if one cannot be read for another
    reason than that a file is missing. Nothing is changed.
    """
    notes: list[str] = []
    damaged: list[Path] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            checkpoint = _load(path)
            value = accept(checkpoint)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            reason = str(error)
        except _UNFIT as error:
            reason = _reason(error)
        else:
            return Found(value, checkpoint, damaged, notes)
        damaged.append(path)
        notes.append(f"checkpoint {path.name} is damaged and is passed over: {reason}")
    if damaged:
        short = [
            note.removeprefix("checkpoint ").replace(" is damaged and is passed over", "")
            for note in notes
        ]
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {folder} can be used, nothing was changed "
            f"(newest first: {'; '.join(short)}); "
            "put a good copy back, or start anew with --force, which moves this run aside"
        )
    return Found(None, None, [], [])


def set_aside(damaged: list[Path]) -> list[str]:
    """Rename damaged checkpoints, so that the ones written from here on are not mistaken for older
    than these.
    """
    notes = []
    for path in damaged:
        target = path.with_name(path.name.replace("update-", "damaged-"))
        number = 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name.replace('update-', 'damaged-')}-{number}")
        os.replace(path, target)
        notes.append(f"{path.name} is kept as {target.name}")
    return notes


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": checksum(p)} for p in sorted(folder.iterdir())
    }
    whole = json.loads(json_text({**state, "files": files}))  # as it will be read: keys are strings
    (folder / STATE).write_text(json_text({**whole, _DIGEST: _digest(whole)}, indent=1) + "\n")


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(state, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / STATE).read_bytes())
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        raise ValueError(f"{STATE} lists no files")
    digest = state.pop(_DIGEST, None)
    if digest is not None and digest != _digest(state):
        raise ValueError(f"{STATE} is not what was written: its SHA-256 differs")
    files = state.pop("files")
    for name, about in files.items():
        _check_file(path, name, about)
    groups = {name.removesuffix(".safetensors"): load_file(path / name) for name in files}
    return Checkpoint(path, groups, state)


def _check_file(folder: Path, name: str, about: Any) -> None:
    """Size and SHA-256 as the state says; older checkpoints have the size only."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"{STATE} names {name!r}, which is no file of a checkpoint")
    size = about["bytes"] if isinstance(about, dict) else about
    found = (folder / name).stat().st_size
    if found != size:
        raise ValueError(f"{name} has {found} bytes, expected {size}")
    if isinstance(about, dict) and checksum(folder / name) != about["sha256"]:
        raise ValueError(f"{name} is not what was written: its SHA-256 differs")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | SafetensorError):
        return text
    return f"{STATE} does not hold what it should ({type(error).__name__}: {text})"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("update-"))


def _remove(path: Path) -> None:
    if path.is_symlink():  # of somebody who keeps it elsewhere
        path.unlink()
    else:
        shutil.rmtree(path)
