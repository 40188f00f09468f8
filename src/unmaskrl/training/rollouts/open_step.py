"""The step in progress, and how a checkpoint keeps it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...core.types import Rollout
from .threshold_policy import Choices


@dataclass(slots=True, kw_only=True)
class Batch:
    """The step in progress: rows that are trained on, their likelihoods per inner update, metrics
    so far.
    """

    rollout: Rollout
    advantages: Tensor
    old_logps: Tensor  # (num_iterations, B, L)
    ref_logps: Tensor | None
    group_actions: Tensor  # (B,): action tokens of each row's group
    # of the whole step over all ranks, left-out rows included; and of what is scored
    counts: dict[str, float]
    choices: Choices | None
    metrics: dict[str, float | None]
    inner_metrics: list[dict[str, float]]


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """The open step as named tensors."""
    rollout = {
        f"rollout/{k}": v
        for f in fields(Rollout)
        if isinstance(v := getattr(batch.rollout, k := f.name), Tensor)
    }
    tensors = rollout | {
        "advantages": batch.advantages,
        "old_logps": batch.old_logps,
        "group_actions": batch.group_actions,
    }
    if batch.choices is not None:
        tensors |= {f"choices/{name}": value for name, value in batch.choices.tensors().items()}
    return tensors if batch.ref_logps is None else tensors | {"ref_logps": batch.ref_logps}


def batch_state(batch: Batch) -> dict[str, Any]:
    """What of it is no tensor."""
    return {
        "metrics": batch.metrics,
        "inner_metrics": batch.inner_metrics,
        "counts": batch.counts,
        "gen_length": batch.rollout.gen_length,
        "temperature": batch.rollout.temperature,
        "exact": batch.rollout.exact,
        "block_length": batch.rollout.block_length,
        "top_k": batch.rollout.top_k,
        "top_p": batch.rollout.top_p,
    }


def restore_batch(tensors: dict[str, Tensor], state: dict[str, Any], device: torch.device) -> Batch:
    """The inverse of ``batch_tensors``, on ``device``."""
    prefix = "rollout/"
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    rollout: dict[str, Any] = {
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
    }
    rollout |= {key: state[key] for key in ("gen_length", "temperature", "exact")}
    for key in ("block_length", "top_k", "top_p"):  # absent in older checkpoints
        rollout[key] = state.get(key)
    choices = {
        k.removeprefix("choices/"): v for k, v in tensors.items() if k.startswith("choices/")
    }
    return Batch(
        rollout=Rollout(**rollout),
        advantages=tensors["advantages"],
        old_logps=tensors["old_logps"],
        ref_logps=tensors.get("ref_logps"),
        group_actions=tensors["group_actions"],
        choices=Choices(**choices) if choices else None,
        counts=state["counts"],
        metrics=state["metrics"],
        inner_metrics=state["inner_metrics"],
    )
