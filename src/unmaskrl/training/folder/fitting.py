"""What a checkpoint must hold for a run to go on from it: the names, shapes and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...core.finite import first_not_finite
from ...models.weights import trainable
from ...recipes.schema import OptimizerConfig
from .checkpoint import Checkpoint
from .optimizer_state import check_state


def group_of(group: str, tensors: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A group of a checkpoint; ValueError if it has none."""
    if group not in tensors:
        raise ValueError(f"it holds no {group}.safetensors")
    return tensors[group]


def check_tensors(
    group: str, expected: Mapping[str, Tensor], tensors: Mapping[str, dict[str, Tensor]]
) -> None:
    """ValueError unless a group of a checkpoint has the names and shapes of ``expected``."""
    found = group_of(group, tensors)
    names = sorted(found.keys() ^ expected.keys())
    wrong = [
        f"{name} {tuple(found[name].shape)} (expected {tuple(tensor.shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if names or wrong:
        what = (
            f"other tensors ({', '.join(names[:3])})"
            if names
            else f"other shapes: {', '.join(wrong[:3])}"
        )
        raise ValueError(f"{group}.safetensors has {what} than the recipe's model")
    if (bad := first_not_finite(found)) is not None:  # older versions saved such
        raise ValueError(f"{group}.safetensors has {bad}, which is not finite")


def check_optimizer_group(
    group: str, config: OptimizerConfig, model: nn.Module, checkpoint: Checkpoint
) -> None:
    """ValueError unless a checkpoint's ``group`` is the state of ``model``'s optimiser."""
    tensors = group_of(group, checkpoint.tensors)
    check_state(group, config, trainable(model), tensors, checkpoint.state[group])


def whole_number(state: Mapping[str, Any], key: str) -> int:
    """A count in a checkpoint's state; ValueError if it is something else."""
    value = state[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} is {value!r}, expected a whole number of at least 0")
    return value


def real_number(state: Mapping[str, Any], key: str) -> float:
    """A number in a checkpoint's state; ValueError if it is something else."""
    value = state[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {value!r}, expected a number")
    return value
