"""The weights that a server is to load: a folder per version, whole before it is named."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.files import sync
from ..checkpoint import save_model

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LENGTH = 12  # hexadecimal digits of a version's fingerprint
_PART = ".part"
_MOVED = "step-"  # what versions begin with, and folders of theirs


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the sums of all tensors' bits: weights that were changed have another one.

    Every number is read once and nothing is copied. Of a sharded tensor this rank's part counts.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        part: Any = tensor.detach()
        part = part.to_local() if hasattr(part, "to_local") else part
        bits = part.contiguous().view(_BITS[part.element_size()])
        digest.update(f"{name} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()[:_LENGTH]


def write_version(
    folder: Path, version: str, model: nn.Module, tensors: Mapping[str, Tensor]
) -> Path:
    """``folder/version`` in the Hugging Face layout, whole or not there at all. OSError if the disk
    has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / version
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if target.is_dir():
        shutil.rmtree(target)
    part = folder / (version + _PART)
    shutil.rmtree(part, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**30:.1f} GiB left, the weights for the server need "
            f"{needed / 2**30:.1f}: set rollouts.folder to a larger one that the server sees too"
        )
    save_model(model, part, tensors=tensors)
    part.rename(target)
    sync(folder)
    return target


def remove_others(folder: Path, version: str) -> None:
    """Delete the versions before this one, and what a killed process left half-written."""
    for old in folder.glob(f"{_MOVED}*"):
        if old.is_dir() and old.name != version:
            shutil.rmtree(old, ignore_errors=True)
