"""d1's one-pass mean field (diffu-GRPO, arXiv 2504.12216, diffu_grpo_trainer.py).

    l_i = log p(y_i | q~, every open completion token masked)

with each prompt token of q~ masked with probability ``p_mask_prompt`` (0.15 in d1). One view. Anchors stay visible unless
``hide_anchors``. Biased: it ignores all revealed context.
"""

from __future__ import annotations

import torch

from ..rng import draw_seed
from ..types import Rollout, Views
from .base import Estimator, mask_view, position_uniform, weighted_sum


def mean_field(*, p_mask_prompt: float = 0.15, hide_anchors: bool = False) -> Estimator:
    """Mean-field log-probs: the fully masked completion, with prompt tokens dropped at random. Nats."""
    if not 0 <= p_mask_prompt < 1:
        raise ValueError(f"p_mask_prompt must be in [0, 1), got {p_mask_prompt}")

    def make_views(rollout: Rollout, mask_id: int, generator: torch.Generator) -> Views:
        dropped = rollout.prompt_mask & (position_uniform(rollout, draw_seed(generator)) < p_mask_prompt)
        hidden = rollout.action_mask | dropped
        if hide_anchors:
            hidden = hidden | rollout.anchor_mask
        ids = mask_view(rollout, hidden, mask_id)
        return Views(ids=ids[:, None], weight=rollout.action_mask[:, None].float())

    return Estimator(make_views, weighted_sum, lambda has_exit: 1)
