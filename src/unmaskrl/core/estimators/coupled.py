"""Coupled masks of DiffuCoder's coupled-GRPO (arXiv 2506.20639, coupled_grpo.py).

rho ~ U(rho_low, rho_high), M ~ Bernoulli(rho) per token; three canvases: all masked, M masked, the
complement masked:

    l_i = 1/2 [ log p(y_i | all masked) + (i in M ? log p(y_i | M masked) / rho : log p(y_i | rest
    masked) / (1 - rho)) ]

As published its weights sum to 1.5 in expectation, so that its ratio is about r ** 1.5;
``normalise`` divides by 1.5 (every weight by 3 instead of 2): a mean of two any-order terms
and the mean field. The prompt stays as it is. Here each row draws its rho and what follows the
first EOS is always hidden; there a micro-batch shares one rho, and M and its complement cover that
tail as well. Three views. Nats.
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

_RATE = 0
_SUBSET = 1


def coupled(
    *,
    rho_low: float = 0.2,
    rho_high: float = 0.8,
    normalise: bool = False,
    hide_anchors: bool = False,
) -> Estimator:
    """The full mask and a random mask with its complement, inverse-probability weights. Nats."""
    if not 0 < rho_low <= rho_high < 1:
        raise ValueError(f"need 0 < rho_low <= rho_high < 1, got {rho_low} and {rho_high}")
    scale = 3 if normalise else 2

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        seed = draw_seed(generator)
        actions = rollout.action_mask
        candidates = maskable(rollout, hide_anchors)
        rho = rho_low + (rho_high - rho_low) * row_uniform(rollout, seed, _RATE)[:, None]
        drawn = position_uniform(rollout, seed, _SUBSET) < rho
        subsets = [candidates, candidates & drawn, candidates & ~drawn]
        weights = [1 / scale, 1 / (scale * rho), 1 / (scale * (1 - rho))]
        ids = [mask_view(rollout, subset, mask_id) for subset in subsets]
        return stack_views(
            ids,
            [(subset & actions) * weight for subset, weight in zip(subsets, weights, strict=True)],
        )

    return Estimator(make_views, weighted_sum, lambda gen_length, nfe, has_exit: 3, num_shared=1)
