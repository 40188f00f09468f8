"""What a likelihood surrogate is: how to mask the finished canvas, and how to combine the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..rng import counter_uniform
from ..types import Rollout, Views, completion_columns


class Estimator(NamedTuple):
    """A surrogate for log p(action tokens | prompt, anchors).

    ``make_views(rollout, mask_id, generator)`` masks, never edits, and scores only masked action tokens; ``reduce`` turns
    view log-probs (B, M, L) into token log-probs (B, L). ``num_views(has_exit)``: canvases per row, which is the
    estimator's cost in denoiser calls per likelihood.
    """

    make_views: Callable[[Rollout, int, torch.Generator], Views]
    reduce: Callable[[Tensor, Views], Tensor]
    num_views: Callable[[bool], int]


def weighted_sum(view_logps: Float[Tensor, "B M L"], views: Views) -> Float[Tensor, "B L"]:
    """sum_m weight_m * log p_m."""
    return (view_logps * views.weight).sum(1)


def mask_view(rollout: Rollout, masked: Bool[Tensor, "B L"], mask_id: int) -> Int[Tensor, "B L"]:
    """The finished canvas with ``masked`` hidden, and everything after the first EOS hidden.

    Tokens after the first EOS are no part of the completion; the policy is scored as if it had never seen them. (While the
    row was decoded they were mostly open; an anchor there was visible.)
    """
    tail = completion_columns(rollout.ids, rollout.gen_length) & ~rollout.completion_mask
    return torch.where(masked | tail, mask_id, rollout.ids)


def position_uniform(rollout: Rollout, seed: int, *key: int) -> Float[Tensor, "B L"]:
    """A uniform per position, keyed by (seed, key, row id, distance from the canvas' end): the same in any batch."""
    length = rollout.ids.shape[1]
    from_end = torch.arange(length, 0, -1, device=rollout.ids.device)
    constants = [torch.full_like(rollout.row_ids[:, None], k) for k in key]
    return counter_uniform(seed, *constants, rollout.row_ids[:, None], from_end[None, :])


def row_uniform(rollout: Rollout, seed: int, *key: int) -> Float[Tensor, " B"]:
    """A uniform per row, keyed by (seed, key, row id)."""
    constants = [torch.full_like(rollout.row_ids, k) for k in key]
    return counter_uniform(seed, *constants, rollout.row_ids)
