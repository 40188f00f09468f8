"""The tensors that a run trains: all weights or adapters only, whole or sharded; their
average; copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .denoiser import ModelDenoiser


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def frozen_copy(denoiser: ModelDenoiser) -> ModelDenoiser:
    """The same weights in a module of its own, without gradients."""
    return replace(denoiser, model=copy.deepcopy(denoiser.model).requires_grad_(False))


@torch.no_grad()
def start_average(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the trained tensors, in float32 at least: small updates would vanish in a bfloat16
    average.
    """
    return {
        name: p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for name, p in trainable(module).items()
    }


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * parameters; nothing if no average is kept."""
    learning = trainable(module)
    for name, mean in average.items():
        mean.lerp_(learning[name].to(mean.dtype), 1 - decay)


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other values in its trained tensors, for as long as the block lasts."""
    own = {name: p.detach().clone() for name, p in trainable(module).items()}
    load_trainable(module, values)
    try:
        yield
    finally:
        load_trainable(module, own)


@torch.no_grad()
def load_trainable(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy whole or sharded tensors into the trained parameters; ValueError unless the names are
    the same.
    """
    parameters = trainable(module)
    if parameters.keys() != values.keys():
        raise ValueError(
            f"stored weights and model differ in {sorted(parameters.keys() ^ values.keys())[:3]}"
        )
    for name, parameter in parameters.items():
        parameter.copy_(like(values[name], parameter))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks (all must call), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as ``target`` is."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)
