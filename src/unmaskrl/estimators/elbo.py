"""Count-weighted ELBO of the free completion tokens, given prompt and anchors.

Let R be the action tokens that were not filled by the exit call (r of them), E those that were, A the anchors. Draw
n ~ U{1..|C|}, a uniform n-subset M of the candidates C, and score the tokens of M that lie in R:

    L = (|C| / n) * sum_{i in M & R} log p(y_i | q, canvas with M, E and everything after EOS masked)

is unbiased for the any-order ELBO  E_order sum_{i in R} log p(y_i | q, y_A, y_{before i})  (stp.md 3.4; LLaDA's 1/t
weight in its low-variance count form). C = R under the published rule (anchors are always visible); with
``hide_anchors`` C = R + A: anchors may be hidden too, but are never scored. That is what lets a policy learn from anchored
rollouts how to answer without anchors (sparse.md). The exit tokens add their own exact term, one view:

    sum_{i in E} log p(y_i | q, canvas with E masked)

so that the estimate is of the process that was run (stp.md 3.5). ``num_mc`` draws are averaged; ``stratified`` puts
one count n in each of num_mc equal strata, which leaves each mean as it is and removes most of the variance.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..rng import draw_seed
from ..types import Rollout, Views
from .base import Estimator, mask_view, position_uniform, row_uniform, weighted_sum

_COUNT, _SUBSET = 0, 1


def elbo(*, num_mc: int = 3, stratified: bool = True, hide_anchors: bool = False) -> Estimator:
    """The unbiased ELBO with ``num_mc`` views (plus one where temporal pruning filled tokens). Nats."""
    if num_mc < 1:
        raise ValueError(f"num_mc must be at least 1, got {num_mc}")

    def make_views(rollout: Rollout, mask_id: int, generator: torch.Generator) -> Views:
        seed = draw_seed(generator)
        exits = rollout.exit_mask
        rest = rollout.action_mask & ~exits
        candidates = rest | (rollout.anchor_mask & rollout.completion_mask) if hide_anchors else rest
        size = candidates.sum(-1)
        ids, weights = [], []
        for k in range(num_mc):
            share = row_uniform(rollout, seed, _COUNT, k if not stratified else 0)
            share = (share + k) / num_mc if stratified else share
            count = 1 + (share * size).floor().long().clamp(max=(size - 1).clamp(min=0))
            subset = smallest(position_uniform(rollout, seed, _SUBSET, k), candidates, count)
            scored = subset & rest
            ids.append(mask_view(rollout, subset | exits, mask_id))
            weights.append(scored * (size / (count * num_mc))[:, None])
        if bool(exits.any()):
            ids.append(mask_view(rollout, exits, mask_id))
            weights.append(exits.double())
        return Views(ids=torch.stack(ids, 1), weight=torch.stack([w.float() for w in weights], 1))

    return Estimator(make_views, weighted_sum, lambda has_exit: num_mc + has_exit)


def smallest(keys: Float[Tensor, "B L"], candidates: Bool[Tensor, "B L"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """The ``count`` candidates with the smallest keys in each row: a uniform subset if the keys are iid."""
    order = keys.masked_fill(~candidates, float("inf")).argsort(-1)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return candidates & (rank < count[:, None])
