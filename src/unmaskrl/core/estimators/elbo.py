"""Count-weighted ELBO of the free completion tokens, given prompt and anchors.

Let R be the action tokens that were not filled by the exit call (r of them), E those that were, A
the anchors. Draw n ~ U{1..|C|}, a uniform n-subset M of the candidates C, and score the tokens of M
that lie in R:

    L = (|C| / n) * sum_{i in M & R} log p(y_i | q, canvas with M, E and everything after EOS
    masked)

is unbiased for the any-order ELBO

    E_order sum_{i in R} log p(y_i | q, y_A, y_{before i})

(LLaDA, arXiv 2502.09992, has both forms: the weight 1/t, and this one by counts, of less variance).
C = R under STP's rule (arXiv 2602.08905: anchors are always visible); with ``hide_anchors`` C = R +
A: anchors may be hidden too, but are never scored. That is what lets a policy learn from anchored
rollouts how to answer without anchors (docs/recipes.md). The exit tokens add their own exact term,
one view:

    sum_{i in E} log p(y_i | q, canvas with E masked)

so that the estimate is of the process that was run (docs/theory.md, section 3). ``num_mc`` draws
are averaged.
``stratified`` draws one count n in each of equal strata, with a uniform of its own: the variance is
never above that of independent counts. (With one uniform for all strata it can be: where log p has
a period in n.) ``antithetic`` draws in pairs from one random order of C: its first n tokens, and
its last |C| + 1 - n, so that every token is scored; strata are then strata of pairs, n up to (|C| +
1) / 2. Both leave each mean as it is. For block-causal denoisers the order is one of each block's
tokens, and counts, strata and pairs are of a block: one view covers them all, and one more the
exits of all blocks. ``visible`` is something else: the surrogate of STP's published code (see
``_published_views``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rng import counter_uniform, draw_seed
from ..types import Rollout, Views
from .base import (
    ONLY,
    Estimator,
    Update,
    any_order_candidates,
    any_order_views,
    block_sizes,
    mask_view,
    position_uniform,
    row_uniform,
    smallest,
    smallest_in_blocks,
    stack_views,
    uniform_count,
    weighted_sum,
)

_COUNT = 0
_SUBSET = 1


def elbo(
    *,
    num_mc: int = 3,
    stratified: bool = True,
    antithetic: bool = False,
    visible: bool = False,
    hide_anchors: bool = False,
) -> Estimator:
    """The unbiased ELBO with ``num_mc`` views (plus one where temporal pruning filled tokens).
    Nats.
    """
    if num_mc < 1:
        raise ValueError(f"num_mc must be at least 1, got {num_mc}")
    if antithetic and num_mc % 2:
        raise ValueError(f"antithetic views come in pairs: num_mc must be even, got {num_mc}")
    if visible and antithetic:
        raise ValueError(
            "visible=true is the surrogate of STP's code, which has no antithetic views; unset one "
            "of them"
        )
    strata = num_mc // 2 if antithetic else num_mc

    def shares(rollout: Rollout, seed: int, k: int) -> Tensor:
        share = row_uniform(rollout, seed, _COUNT, k)
        share = (share + k) / strata if stratified else share
        # counts n and |C| + 1 - n are one pair: half of the range is all of it
        return share / 2 if antithetic else share

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        seed = draw_seed(generator)
        if visible:
            drawn = [shares(rollout, seed, k) for k in range(strata)]
            return _published_views(rollout, mask_id, drawn, seed, hide_anchors)
        candidates = any_order_candidates(rollout, hide_anchors)
        if rollout.block_length is not None:
            return _block_views(rollout, mask_id, candidates, seed, strata, stratified, antithetic)
        size = candidates.sum(-1)
        draws = []
        for k in range(strata):
            count = uniform_count(shares(rollout, seed, k), size)
            keys = position_uniform(rollout, seed, _SUBSET, k)
            draws.append((smallest(keys, candidates, count), size / (count * num_mc)))
            if antithetic:
                rest = (size + 1 - count).clamp(min=1)
                draws.append((smallest(-keys, candidates, rest), size / (rest * num_mc)))
        return any_order_views(rollout, mask_id, draws)

    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: num_mc + (has_exit and not visible),
        scores_visible=visible,
        blockwise=not visible,
    )


def _block_views(
    rollout: Rollout,
    mask_id: int,
    candidates: Tensor,
    seed: int,
    strata: int,
    stratified: bool,
    antithetic: bool,
) -> Views:
    """A count and a subset of every block's candidates by themselves: one view covers all blocks.

    In the k-th view neighbouring blocks are in neighbouring strata, and each block is in every
    stratum once.
    """
    blocks = rollout.block_ids
    size = block_sizes(candidates, blocks)
    num_draws = strata * (1 + antithetic)
    draws = []
    for k in range(strata):
        stream = (torch.full_like(blocks, _COUNT), torch.full_like(blocks, k))
        share = counter_uniform(seed, *stream, rollout.row_ids[:, None].expand_as(blocks), blocks)
        if stratified:
            share = (share + (blocks + k) % strata) / strata
        if antithetic:
            share = share / 2
        count = uniform_count(share, size)
        keys = position_uniform(rollout, seed, _SUBSET, k)
        halves = [(keys, count)]
        if antithetic:
            halves.append((-keys, (size + 1 - count).clamp(min=1)))
        for order, number in halves:
            subset = smallest_in_blocks(order, candidates, number, blocks)
            draws.append((subset, size / (number * num_draws)))
    return any_order_views(rollout, mask_id, draws)


def _published_views(
    rollout: Rollout, mask_id: int, shares: list[Tensor], seed: int, hide_anchors: bool
) -> Views:
    """The surrogate in the code of STP (arXiv 2602.08905): n ~ U{1..c} of all c completion tokens
    masked (anchors spared), then the plain mean over draws of log p(y_i) at *every* action token,
    masked or not. No ELBO: visible tokens are copied.
    """
    ids = []
    weights = []
    size = rollout.completion_mask.sum(-1)
    for k, share in enumerate(shares):
        subset = smallest(
            position_uniform(rollout, seed, _SUBSET, k),
            rollout.completion_mask,
            uniform_count(share, size),
        )
        ids.append(
            mask_view(rollout, subset if hide_anchors else subset & ~rollout.anchor_mask, mask_id)
        )
        weights.append(rollout.action_mask / len(shares))
    return stack_views(ids, weights)
