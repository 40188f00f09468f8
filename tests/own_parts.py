"""Parts of a method as a user would write them, in a file outside the package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from unmaskrl.core.decoding import Rule
from unmaskrl.core.estimators import Estimator
from unmaskrl.core.estimators.base import ONLY, Update
from unmaskrl.core.losses import PolicyLoss
from unmaskrl.core.types import LossOutputs, Rollout, TrainBatch, Views


def all_hidden(*, scale: float = 1.0) -> Estimator:
    """Every action token given the prompt and the anchors: one pass, nothing drawn."""

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        tail = ~(rollout.completion_mask | rollout.prompt_mask) & rollout.attention_mask
        ids = torch.where(rollout.action_mask | tail, mask_id, rollout.ids)
        return Views(ids=ids[:, None], weight=scale * rollout.action_mask[:, None].float())

    def reduce(view_logps: Tensor, views: Views) -> Tensor:
        return (view_logps * views.weight).sum(1)

    return Estimator(make_views, reduce, lambda gen_length, nfe, has_exit: 1)


def squared_ratio(*, strength: float = 0.5) -> PolicyLoss:
    """- A l + strength (l - l_old)^2 / 2, a mean over tokens."""

    def loss(token_logps: Tensor, batch: TrainBatch) -> LossOutputs:
        mask = batch.action_mask
        gain = batch.advantages[:, None] * token_logps
        cost = strength * (token_logps - batch.old_logps) ** 2 / 2
        total = ((cost - gain) * mask).sum() / max(batch.num_actions, 1.0)
        moved = ((token_logps - batch.old_logps).detach().abs() * mask).sum()
        metrics = {"moved": moved / max(batch.num_scored, 1.0)}
        return LossOutputs(loss=total, metrics=metrics)

    # rows without advantage have a gradient as well, as under a KL term: the loop keeps them
    return PolicyLoss(loss, uses_old=True, uses_ref=False, kl_coef=strength, kl_to="old")


def centred(*, scale: float = 1.0):
    """The reward less the group's mean, as a plain function."""

    def advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
        same = (group_ids[:, None] == group_ids[None]).to(rewards.dtype)
        return scale * (rewards - same @ rewards / same.sum(1))

    return advantages


def from_both_ends() -> Rule:
    """The first and the last open position before those between."""

    def score(
        logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor
    ) -> Tensor:
        return (offset.double() - offset.double().mean()).abs()

    return Rule(score, needs_logits=False)


class Signs(torch.optim.Optimizer):
    """Steps of equal size along the sign of a momentum."""

    def __init__(self, parameters: Iterable[Any], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.mul_(group["momentum"]).add_(parameter.grad)
                parameter.sub_(group["lr"] * mean.sign())
