"""UniGRPO's structured noising (MMaDA, arXiv 2505.15809): one view, its masking rate set by the
inner update.

The first of mu inner updates masks at a random step t_1 = ceil(u T) of T = ``num_steps``, u ~ U(0,
1) per row; the others
are spread evenly up to T:  t_n = floor((n - 1) / (mu - 1) * (T - t_1) + t_1),  so the last one
    masks everything:

    l_i = log p(y_i | each completion token masked with probability t_n / T),  scored where masked

(Algorithm 1 of the paper with ceil for its floor, which could mask nothing in the first update; the
paper's own example, 100, 300, 500, 700, 900 of 1000, stops short of T instead. No code of its
authors is public. The UniGRPO in the code of STP, arXiv 2602.08905, has one u per batch and scores
visible tokens too.)
Biased: it is a plain, not a count-weighted, log-probability. One view. Nats.
"""

from __future__ import annotations

import torch

from ..rng import draw_seed
from ..types import Rollout, Views
from .base import (
    ONLY,
    Estimator,
    Update,
    mask_view,
    maskable,
    position_uniform,
    row_uniform,
    stack_views,
    weighted_sum,
)


def unigrpo(*, num_steps: int = 128, hide_anchors: bool = False) -> Estimator:
    """One random mask whose rate climbs over the inner updates. Nats."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        # one draw for all inner updates
        first = (row_uniform(rollout, update.seed) * num_steps).ceil()
        done = update.index / (update.total - 1) if update.total > 1 else 0.0
        rate = (done * (num_steps - first) + first).floor() / num_steps
        drawn = position_uniform(rollout, draw_seed(generator)) < rate[:, None]
        subset = maskable(rollout, hide_anchors) & drawn
        return stack_views([mask_view(rollout, subset, mask_id)], [subset & rollout.action_mask])

    return Estimator(
        make_views, weighted_sum, lambda gen_length, nfe, has_exit: 1, needs_updates=True
    )
