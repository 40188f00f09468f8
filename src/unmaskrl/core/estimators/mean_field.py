"""d1's one-pass mean field (diffu-GRPO, arXiv 2504.12216, diffu_grpo_trainer.py).

    l_i = log p(y_i | q~, every open completion token masked)

with each prompt token of q~ masked with probability ``p_mask_prompt`` (0.15 in d1). One view.
Anchors stay visible unless ``hide_anchors``. Biased: it ignores all revealed context. With
``share_prompt_mask`` the rollouts of a group draw the same prompt mask; without anchors they then
share one canvas, which is run once for the whole group.
"""

from __future__ import annotations

import torch

from ..rng import draw_seed
from ..types import Rollout, Views
from .base import (
    DRAW,
    ONLY,
    Estimator,
    Update,
    mask_view,
    maskable,
    position_uniform,
    stack_views,
    weighted_sum,
)


def mean_field(
    *, p_mask_prompt: float = 0.15, share_prompt_mask: bool = False, hide_anchors: bool = False
) -> Estimator:
    """Mean-field log-probs: the fully masked completion, with prompt tokens dropped at random.
    Nats.
    """
    check_p_mask(p_mask_prompt)

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        names = rollout.group_ids if share_prompt_mask else None
        dropped = rollout.prompt_mask & (
            position_uniform(rollout, draw_seed(generator), names=names) < p_mask_prompt
        )
        ids = mask_view(rollout, maskable(rollout, hide_anchors) | dropped, mask_id)
        return stack_views([ids], [rollout.action_mask])

    shared = int(share_prompt_mask or p_mask_prompt == 0)
    drawn = DRAW if p_mask_prompt == 0 else None  # rollouts saw the whole prompt
    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: 1,
        num_shared=shared,
        probability_of=drawn,
        hides_prompt=p_mask_prompt > 0,
        blockwise=p_mask_prompt == 0,
    )


def check_p_mask(p: float, name: str = "p_mask_prompt") -> None:
    """A masking probability that leaves something visible."""
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
