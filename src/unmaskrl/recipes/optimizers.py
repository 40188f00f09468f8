"""The optimiser of a recipe: ``optimizer: {name, lr, ...}`` and the parameters that decay.

Weights of one dimension (norms, biases) do not decay; that changes nothing where ``weight_decay``
is 0. State is counted and stored as the optimiser itself keeps it, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .registry import component, setting
from .schema import OptimizerConfig

SECTION = "optimizer"
_PROBE_SIZE = 64


def adamw(
    parameters: Iterable[Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101)."""
    first, second = betas
    betas = (float(first), float(second))
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


OPTIMIZERS = {"adamw": adamw}


def make_optimizer(config: OptimizerConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser of ``parameters``. ValueError if its factory refuses a setting."""
    spec = {"name": config.name, **config.settings}
    decay = setting(spec, OPTIMIZERS, "weight_decay", SECTION)
    groups = parameter_groups(list(parameters)) if decay else list(parameters)
    made = component(spec, OPTIMIZERS, SECTION, groups, lr=config.lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer.name: {config.name} gave a {type(made).__name__}, not a torch optimiser"
        )
    return made


def learning_rate(config: OptimizerConfig, update: int, share_done: float) -> float:
    """Rate of the 0-based ``update``: linear warm-up, then constant, or linear or cosine decay to 0
    as ``share_done`` -> 1.
    """
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.schedule == "linear":
        return config.lr * (1 - share_done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * share_done))
    return config.lr


def parameter_groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Matrices, which decay, and what has one dimension, which does not; groups without a member
    are left out.
    """
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])


def check_optimizer(config: OptimizerConfig) -> None:
    """ValueError if the optimiser cannot be built from its settings, cannot make a step, or keeps
    what a checkpoint cannot hold.
    """
    probe_state(config, 2)


def probe_state(config: OptimizerConfig, ndim: int) -> dict[str, str]:
    """What the optimiser keeps for a parameter of ``ndim`` dimensions: by key "whole" (a tensor of
    the parameter's shape), "one" (a number or a tensor of one), or "other" (a smaller tensor).
    """
    weight = torch.zeros([_PROBE_SIZE] * min(ndim, 2) + [1] * (ndim - 2))
    kinds = {}
    for key, value in _after_one_step(config, weight).items():
        if isinstance(value, Tensor):
            whole = value.shape == weight.shape
            kinds[key] = "whole" if whole else "other" if value.ndim else "one"
        elif isinstance(value, bool | int | float | None):
            kinds[key] = "one"
        else:
            raise ValueError(
                f"optimizer {config.name} keeps {key}, a {type(value).__name__}: checkpoints hold "
                "tensors and numbers"
            )
    return kinds


def state_share(config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of state per byte of weights of ``dtype``, counted on a matrix."""
    weight = torch.zeros(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    kept = _after_one_step(config, weight).values()
    size = sum(v.numel() * v.element_size() for v in kept if isinstance(v, Tensor) and v.ndim)
    return size / (weight.numel() * weight.element_size())


def _after_one_step(config: OptimizerConfig, weight: Tensor) -> dict[str, Any]:
    """The optimiser's state of ``weight`` after a step."""
    weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer(config, [weight])
    try:
        optimizer.step()
    except Exception as error:  # of a user's code
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"optimizer {config.name}: a step failed ({reason})") from None
    return optimizer.state.get(weight, {})
