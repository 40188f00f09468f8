"""Rollouts as a checkpoint of an open step gives them back."""

from __future__ import annotations

from unmaskrl.core.types import Rollout
from unmaskrl.training.rollouts.open_step import Batch, batch_state, batch_tensors, restore_batch


def restored(rollout: Rollout, *missing: str) -> Rollout:
    """``missing``: fields that an older checkpoint lacks."""
    zeros = rollout.behavior_logps
    batch = Batch(
        rollout=rollout, advantages=zeros[:, 0], old_logps=zeros[None], ref_logps=None,
        group_actions=zeros[:, 0], counts={}, choices=None, metrics={}, inner_metrics=[],
    )  # fmt: skip
    tensors = batch_tensors(batch)
    for name in missing:
        del tensors[f"rollout/{name}"]
    return restore_batch(tensors, batch_state(batch), zeros.device).rollout
