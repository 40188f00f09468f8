"""What an optimiser remembers, as named tensors and numbers: whichever optimiser it is.

Tensors are named ``<parameter>/<key>`` and go into a file of the checkpoint; numbers (of parameters
and of parameter groups, where some optimisers count their steps) go into its ``state.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models.weights import like
from ...recipes.optimizers import probe_state
from ...recipes.schema import OptimizerConfig

Number = bool | int | float | None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The numbers of an optimiser's state and of its groups. The learning rate is not among them:
    the loop sets it for every update.
    """
    state = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Number)
    }
    groups = [
        {k: v for k, v in group.items() if isinstance(v, Number) and k != "lr"}
        for group in optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """The inverse of ``optimizer_tensors`` and ``optimizer_numbers``."""
    parameters = dict(model.named_parameters())
    # torch keeps ``step`` on the CPU unless its kernels read it
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    for label, value in {**tensors, **numbers["state"]}.items():
        name, _, key = label.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = like(value, parameter)
        elif isinstance(value, Tensor) and (key != "step" or on_device):
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
    for group, stored in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(stored)


def check_state(
    group: str,
    config: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """ValueError unless this is the optimiser's state of (some of) ``parameters``: keys that it
    keeps, of the parameter's shape where it keeps that shape.
    """
    known = {ndim: probe_state(config, ndim) for ndim in {p.ndim for p in parameters.values()}}
    for label, value in {**tensors, **numbers["state"]}.items():
        name, _, key = label.rpartition("/")
        if name not in parameters or key not in known[parameters[name].ndim]:
            raise ValueError(
                f"{group}.safetensors has {label}, which is no state of the recipe's model"
            )
        if not isinstance(value, Tensor):
            continue
        kind = known[parameters[name].ndim][key]
        expected = {"whole": parameters[name].shape, "one": torch.Size()}.get(kind, value.shape)
        if value.shape != expected:
            raise ValueError(
                f"{group}.safetensors has {label} of shape {tuple(value.shape)}, expected "
                f"{tuple(expected)}"
            )
