"""A folder with a low-rank adapter in peft's layout, put on its base without peft: W +
scale B A, layer by layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..utils.files import read_json
from .hub import ADAPTER

TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# what changes a layer in another way than W + scale B A; anything but these values is refused
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter belongs to."""

    path: str
    revision: str | None


def base_of(folder: Path) -> Base | None:
    """The base that an adapter folder names; None for any other folder."""
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return None
    config = read_json(folder / ADAPTER)
    path = config.get("base_model_name_or_path")
    if not isinstance(path, str) or not path:
        raise ValueError(
            f"{folder / ADAPTER} names no base_model_name_or_path: write there which model it "
            "adapts"
        )
    revision = config.get("revision")
    return Base(path, revision if isinstance(revision, str) and not Path(path).is_dir() else None)


@torch.no_grad()
def put_on(model: nn.Module, folder: Path) -> None:
    """Add an adapter to its base's weights. ValueError if it is of another kind, or does not
    fit.
    """
    config = read_json(folder / ADAPTER)
    for key, allowed in _PLAIN.items():
        if config.get(key) not in allowed:
            raise ValueError(
                f"{folder / ADAPTER}: {key}={config.get(key)!r} is not supported; merge it by peft "
                "first"
            )
    scale = _scale(config, folder)
    weights = dict(model.named_parameters())
    for layer, (a, b) in _pairs(folder).items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"{folder / TENSORS}: {layer} takes {a.shape[1]} to {b.shape[0]} values, its base "
                "has "
                f"{'no such layer' if weight is None else tuple(weight.shape)}; give the base that "
                "it was trained on"
            )
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = scale * (b.to(weight.device, wide) @ a.to(weight.device, wide))
        weight.copy_((weight.to(delta.dtype) + delta).to(weight.dtype))


def _scale(config: dict[str, Any], folder: Path) -> float:
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{folder / ADAPTER}: expected numbers r and lora_alpha, got {rank!r} and {alpha!r}"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted layer."""
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / TENSORS} cannot be read ({error}); save or download the adapter again"
        ) from None
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if half not in ("A", "B") or tensor.ndim != 2:
            raise ValueError(
                f"{folder / TENSORS}: {name} is no matrix of a low-rank adapter; merge it by peft "
                "first"
            )
        halves.setdefault(layer, {})[half] = tensor
    for layer, pair in halves.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(
                f"{folder / TENSORS}: lora_A and lora_B of {layer} do not fit together; save the "
                "adapter again"
            )
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}
