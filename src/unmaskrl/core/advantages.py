"""Advantages within groups of rollouts of one prompt. Pure functions; rows of a group need not be
adjacent.

Statistics are taken in float64 and without a sum or a square that could overflow: rewards of 1e20
have the advantages of rewards of 1. An advantage that its dtype cannot hold is infinite, never
quietly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_mean(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A_i = r_i - mean of the group (Dr. GRPO; d1)."""
    deviation, _ = _group_stats(rewards, group_ids)
    return torch.where(groups_with_spread(rewards, group_ids), deviation.to(rewards.dtype), 0.0)


def group_mean_std(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], eps: float = 1e-4
) -> Float[Tensor, " B"]:
    """A_i = (r_i - mean) / (std + eps), std with n - 1 (GRPO, arXiv 2402.03300; the 1e-4 is STP's).
    Groups of 1 get 0.
    """
    deviation, std = _group_stats(rewards, group_ids)
    advantages = deviation / (std + eps)
    # a mean of equal numbers can be off by a rounding error, which a small eps would blow up
    return torch.where(groups_with_spread(rewards, group_ids), advantages.to(rewards.dtype), 0.0)


def leave_one_out(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """A_i = r_i - mean of the others = G / (G - 1) * (r_i - mean) (RLOO, arXiv 2402.14740). Groups
    of 1 get 0.
    """
    _, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return (
        group_mean(rewards, group_ids) * (count.to(rewards.dtype) / (count - 1).clamp(min=1))[index]
    )


def softmax_weights(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """w+_i - w-_i, softmax of the group's rewards and of their negatives (wd1, arXiv 2507.08838;
    temperature 1).
    """
    wide = rewards.double()
    high, low = _group_ends(wide, group_ids)
    up = (wide - high).exp()
    down = (low - wide).exp()
    weights = up / group_sum(up, group_ids) - down / group_sum(down, group_ids)
    return torch.where(high != low, weights, 0.0).to(rewards.dtype)


def groups_with_spread(
    rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """True at rows whose group has at least two different rewards: the others have advantage 0."""
    high, low = _group_ends(rewards, group_ids)
    return high != low  # NaN is different from itself: it is not made a 0


def group_sum(values: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sum over each row's whole group."""
    _, index = group_ids.unique(return_inverse=True)
    return torch.zeros_like(values).scatter_add(0, index, values)[index]


def _group_ends(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest reward of each row's group."""
    _, index = group_ids.unique(return_inverse=True)
    empty = torch.zeros_like(rewards)  # as many places as there could be groups
    high = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
    low = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return high[index], low[index]


def _group_stats(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's deviation from its group's mean, and the group's standard deviation (n - 1; 0 for
    one row), in float64.
    """
    _, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    wide = rewards.double()
    size = count[index]
    deviation = wide - group_sum(wide, group_ids) / size
    scale = _group_ends(deviation.abs(), group_ids)[0]
    squares = (deviation / scale.clamp(min=torch.finfo(torch.float64).tiny)) ** 2
    return deviation, scale * (group_sum(squares, group_ids) / (size - 1).clamp(min=1)).sqrt()


class Advantage(NamedTuple):
    """A component: (rewards, group_ids) -> advantages. ``weighs_logps``: made to weigh
    log-likelihoods, not a ratio to the old policy.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    weighs_logps: bool = False

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantages (B,) of rewards (B,)."""
        return self.fn(rewards, group_ids)


def _of_group_mean() -> Advantage:
    """r_i - mean of the group."""
    return Advantage(group_mean)


def _of_group_mean_std(*, eps: float = 1e-4) -> Advantage:
    """(r_i - mean) / (std + eps)."""
    if eps <= 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    return Advantage(partial(group_mean_std, eps=eps))


def _of_leave_one_out() -> Advantage:
    """r_i - mean of the others."""
    return Advantage(leave_one_out)


def _of_softmax_weights() -> Advantage:
    """Softmax of the group's rewards less that of their negatives."""
    return Advantage(softmax_weights, weighs_logps=True)


ADVANTAGES = {
    "group_mean": _of_group_mean,
    "group_mean_std": _of_group_mean_std,
    "leave_one_out": _of_leave_one_out,
    "softmax_weights": _of_softmax_weights,
}
