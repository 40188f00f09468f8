"""Checkpoints that are whole or not there: safetensors plus one JSON state, written aside and renamed.

A checkpoint folder ``update-000040`` holds one safetensors file per tensor group and ``state.json``, which lists the size
of every file. The loader takes the newest folder that is complete and says which ones it had to pass over.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .weights import like

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensor groups by name, and everything else."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, update: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int
) -> Path:
    """Write ``folder/update-NNNNNN`` and drop all but the newest ``keep``; OSError leaves the older ones untouched."""
    final = folder / f"update-{update:06d}"
    partial = folder / f".partial-{update:06d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            # clones: tensors that share memory are refused by safetensors
            save_file({k: v.detach().clone().contiguous() for k, v in group.items()}, partial / f"{name}.safetensors")
        sizes = {p.name: p.stat().st_size for p in partial.iterdir()}
        write_json(partial / STATE, {**state, "files": sizes})
        for path in partial.iterdir():
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written ({error}); the older ones are untouched") from None
    for old in sorted(folder.glob("update-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and a line about each newer one that is not."""
    notes = []
    for path in sorted(folder.glob("update-*"), reverse=True):
        try:
            return _load(path), notes
        except (OSError, ValueError, SafetensorError) as error:
            notes.append(f"checkpoint {path.name} is incomplete and is passed over: {error}")
    return None, notes


def write_json(path: Path, data: Any) -> None:
    """Write JSON aside and rename: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    _sync(partial)
    os.replace(partial, path)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as named tensors: ``<parameter>/<exp_avg|exp_avg_sq|step>``."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        optimizer.state[parameters[name]][field] = like(value, parameters[name]) if field != "step" else value


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / STATE).read_text())
    sizes = state.pop("files")
    for name, size in sizes.items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, expected {size}")
    groups = {name.removesuffix(".safetensors"): load_file(path / name) for name in sizes}
    return Checkpoint(path, groups, state)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
