"""The optimiser of a recipe: ``optimizer: {name, lr, ...}`` and the parameters that decay.

Weights of one dimension (norms, biases) do not decay; that changes nothing where ``weight_decay``
is 0. State is counted and stored as the optimiser itself keeps it, whichever it is.
"""

from __future__ import annotations

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


def parameter_groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Matrices, which decay, and what has one dimension, which does not; groups without a member
    are left out.
    """
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])


def check_optimizer(config: OptimizerConfig) -> None:
    """ValueError if the optimiser cannot be built from its settings or cannot make a step."""
    state_share(config)


def state_share(config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> float:
    """Bytes of state per byte of weights of ``dtype``, counted on a matrix of 64 by 64 after one
    step.
    """
    weight = torch.zeros(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype, requires_grad=True)
    optimizer = make_optimizer(config, [weight])
    weight.grad = torch.ones_like(weight)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"optimizer {config.name}: a step failed ({reason})") from None
    kept = sum(
        value.numel() * value.element_size()
        for value in optimizer.state.get(weight, {}).values()
        if isinstance(value, Tensor) and value.ndim
    )
    return kept / (weight.numel() * weight.element_size())
