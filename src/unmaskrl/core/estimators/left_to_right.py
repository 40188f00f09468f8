"""JustGRPO's exact chain (arXiv 2601.15165, grpo.py): tokens in reading order, each from its
prefix.

    l_i = log p(y_i | q, y_{before i}, everything from i on masked)

The sum is the log-probability of a left-to-right rollout (decode.select=left_to_right with one
token per call), whatever order was really decoded. One view per action token of the longest row.
Anchors behind i stay visible unless ``hide_anchors``. Nats.
"""

from __future__ import annotations

import torch

from ..types import Rollout, Views
from .base import (
    ONLY,
    READING,
    Estimator,
    Update,
    largest,
    mask_view,
    maskable,
    stack_views,
    weighted_sum,
)


def left_to_right(*, hide_anchors: bool = False) -> Estimator:
    """The autoregressive factorisation of the denoiser. Nats."""

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        actions = rollout.action_mask
        candidates = maskable(rollout, hide_anchors)
        place = actions.long().cumsum(-1)  # k at the k-th action token and up to the next one
        ids = []
        weights = []
        for k in range(1, max(1, largest(actions.sum(-1))) + 1):
            ids.append(mask_view(rollout, candidates & (place >= k), mask_id))
            weights.append(actions & (place == k))
        return stack_views(ids, weights)

    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: gen_length,
        num_shared=1,
        probability_of=READING,
    )
