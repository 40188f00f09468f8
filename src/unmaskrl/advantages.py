"""Advantages within groups of rollouts of one prompt. Pure functions; rows of a group need not be adjacent."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def group_mean(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A_i = r_i - mean of the group (Dr. GRPO; d1)."""
    mean, _, index = _group_stats(rewards, group_ids)
    return torch.where(groups_with_spread(rewards, group_ids), rewards - mean[index], 0.0)


def group_mean_std(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A_i = (r_i - mean) / (std + 1e-4), std with n - 1 (GRPO, arXiv 2402.03300; the constant is STP's). Groups of 1 get 0."""
    mean, std, index = _group_stats(rewards, group_ids)
    advantages = (rewards - mean[index]) / (std[index] + 1e-4)
    # a mean of equal numbers can be off by a rounding error, which 1e-4 would blow up
    return torch.where(groups_with_spread(rewards, group_ids), advantages, 0.0)


def leave_one_out(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A_i = r_i - mean of the others = G / (G - 1) * (r_i - mean) (RLOO, arXiv 2402.14740). Groups of 1 get 0."""
    _, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return group_mean(rewards, group_ids) * (count.to(rewards.dtype) / (count - 1).clamp(min=1))[index]


def softmax_weights(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """w+_i - w-_i, softmax of the group's rewards and of their negatives (wd1, arXiv 2507.08838; temperature 1)."""
    centred = group_mean(rewards, group_ids)
    up, down = centred.exp(), (-centred).exp()
    weights = up / group_sum(up, group_ids) - down / group_sum(down, group_ids)
    return torch.where(groups_with_spread(rewards, group_ids), weights, 0.0)


def groups_with_spread(rewards: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """True at rows whose group has at least two different rewards: the others have advantage 0."""
    _, inverse = torch.unique(group_ids, return_inverse=True)
    size = int(inverse.max()) + 1 if len(rewards) else 0
    high = rewards.new_full((size,), float("-inf")).scatter_reduce(0, inverse, rewards, "amax")
    low = rewards.new_full((size,), float("inf")).scatter_reduce(0, inverse, rewards, "amin")
    return (high > low)[inverse]


def group_sum(values: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sum over each row's whole group."""
    _, index = group_ids.unique(return_inverse=True)
    return torch.zeros_like(values).scatter_add(0, index, values)[index]


def _group_stats(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(count))
    mean = zeros.scatter_add(0, index, rewards) / count
    square = zeros.scatter_add(0, index, (rewards - mean[index]) ** 2)
    return mean, (square / (count - 1).clamp(min=1)).sqrt(), index


ADVANTAGES = {
    "group_mean": group_mean,
    "group_mean_std": group_mean_std,
    "leave_one_out": leave_one_out,
    "softmax_weights": softmax_weights,
}
