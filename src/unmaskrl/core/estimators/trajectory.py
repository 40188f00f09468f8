"""The rollout's own latents: each token is scored from the canvas at the start of its segment of
the trajectory.

Cut the T calls of a row into segments; s(u) calls were over when segment u began:

    l_i = log p(y_i | q, z_s(u)),   u the segment of the call that revealed y_i

``num_segments`` cuts every row into that many equal parts, s(u) = floor(u T / N) (d2-StepMerge,
arXiv 2509.21474; 1 is the mean field without prompt masks), ``shrink`` joins every so many calls
(TraceRL, arXiv 2509.06949: 8 for LLaDA); with neither, each call is a segment (CJ-GRPO, arXiv
2509.23924): the exact replay, whose sum equals ``behavior_logps`` and, for exact rollouts, is the
log-probability of the rollout. ``p_mask_prompt`` drops prompt tokens (d2: 0.15), which ends
exactness. Views are true latents: what was decoded behind the first EOS is as visible as it was,
and so are anchors (hence no ``hide_anchors``). One view per segment. Nats.

For block-causal denoisers T counts the calls of a row's longest block, and every block is scored
at its own k-th call at once: as many views as a block has calls, however long the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from ..rng import draw_seed
from ..types import Rollout, Views
from .base import (
    DRAW,
    ONLY,
    Estimator,
    Update,
    largest,
    position_uniform,
    stack_views,
    weighted_sum,
)
from .mean_field import check_p_mask


def trajectory(
    *,
    num_segments: int | None = None,
    shrink: int | None = None,
    p_mask_prompt: float = 0.0,
) -> Estimator:
    """Log-probs on the rollout's own latents, exact or merged into segments. Nats."""
    check_p_mask(p_mask_prompt)
    if num_segments is not None and shrink is not None:
        raise ValueError("num_segments and shrink both say how calls are merged: set one of them")
    for name, value in (("num_segments", num_segments), ("shrink", shrink)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    def count(nfe: int) -> int:
        if num_segments is not None:
            return num_segments
        return max(1, -(-nfe // (shrink or 1)))

    def starts(segment: int, nfe: Tensor) -> Tensor:
        """s(u): calls over when the segment began; those of a row without such a segment are its
        last call or later.
        """
        if num_segments is not None:
            return segment * nfe // num_segments
        return torch.full_like(nfe, segment * (shrink or 1))

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        dropped = rollout.prompt_mask & (
            position_uniform(rollout, draw_seed(generator)) < p_mask_prompt
        )
        calls = rollout.num_local_steps
        segments = range(count(largest(calls)))
        views = latent_views(rollout, mask_id, [starts(segment, calls) for segment in segments])
        return replace(views, ids=torch.where(dropped[:, None], mask_id, views.ids))

    whole = p_mask_prompt == 0  # as rollouts saw it

    def fits(gen_length: int, block_length: int, calls: int) -> None:
        if (num_segments or 0) > calls:
            raise ValueError(
                f"estimator.num_segments {num_segments} exceeds the {calls} calls of a rollout; "
                "lower it, or unset it to score every call on its own"
            )

    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: count(nfe),
        num_shared=int(whole),
        probability_of=DRAW if whole else None,
        follows_steps=True,
        exact_event=True,
        hides_prompt=p_mask_prompt > 0,
        replays=True,
        blockwise=whole,
        fits=fits,
    )


def latent_views(rollout: Rollout, mask_id: int, starts: Sequence[Int[Tensor, " B"]]) -> Views:
    """One view per segment: the latent after ``starts[k]`` calls, scored at what the calls up to
    ``starts[k + 1]`` revealed.
    """
    step = rollout.local_step
    ids = []
    weights = []
    for start, end in zip(starts, [*starts[1:], rollout.num_local_steps], strict=True):
        ids.append(rollout.latent(start, mask_id))
        inside = (step > start[:, None]) & (step <= end[:, None])
        weights.append(rollout.action_mask & inside)
    return stack_views(ids, weights)
