"""What a likelihood surrogate is: how to mask the finished canvas, and how to combine the
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..decoding.law import MAX_KEPT
from ..precision import finest
from ..rng import counter_uniform
from ..types import Rollout, Views, completion_columns


class Update(NamedTuple):
    """Which inner update views are made for: the ``index``-th of ``total`` on the same rollouts.

    ``seed`` is shared by all of them; ``advantages`` (B,) are known to surrogates that bound good
    and bad rows differently.
    """

    index: int = 0
    total: int = 1
    seed: int = 0
    advantages: Tensor | None = None


ONLY = Update()
DRAW = "the token drawn"
READING = "the token drawn in reading order"


def _fits_anything(gen_length: int, block_length: int, calls: int) -> None:
    """No setting of the estimator depends on the decoding."""


# why an estimator that is not ``blockwise`` is refused
NOT_BLOCKWISE = (
    "its views mean nothing for a block-causal model, whose blocks see earlier blocks clean; use "
    "trajectory, elbo, espo, two_mean_field, or mean_field with p_mask_prompt=0"
)

# why one that scores what was drawn (``probability_of``) is refused
NOT_KEPT = (
    "it scores what was drawn, and the ids that a token was drawn from are recorded only with "
    f"top_k of at most {MAX_KEPT}; set top_k beside top_p, or use an estimator of the policy "
    "itself (elbo, espo, coupled)"
)


class Estimator(NamedTuple):
    """A surrogate for log p(action tokens | prompt, anchors).

    ``make_views(rollout, mask_id, generator, update=ONLY)`` masks, never edits, and scores only
    masked action tokens; ``reduce`` turns view log-probs (B, M, L) into token log-probs (B, L).
    ``num_views(gen_length, nfe, has_exit)``: canvases per row at most, which is the estimator's
    cost in denoiser calls per likelihood. ``num_shared``: how many of them are the same canvas for
    all rows of a group that has no anchors; each is run once per group. ``probability_of``: what a
    token's score is the log-probability of, which importance weights (``loss.is_cap``) divide by
    that of the draw: ``DRAW``, the token given a canvas that it and later draws do not enter,
    whatever the decoding order; ``READING``, the same if tokens were drawn one by one from left to
    right; None, nothing that was drawn (a weighted sum, a bound, or later tokens are visible). With
    one of them, tokens of a truncated rollout (top_k, top_p) are scored among the ids that they
    were drawn from; with None, among all.
    ``follows_steps``: its views follow the order in which the rollout's tokens were revealed, so an
    engine must tell it.

    What else a recipe's checks ask: ``bound``, scores bound log-likelihoods, so they have no ratio
    and no KL. ``exact_event``, a row's scores sum to the log-probability of its rollout, unless the
    decoding looked at drawn tokens. ``needs_updates``, what is hidden depends on the inner update.
    ``hides_prompt``, views hide prompt tokens. ``replays``, views are the rollout's own latents,
    which show what was decoded behind the first EOS. ``scores_visible``, tokens are scored that
    their view shows. ``blockwise``, its views mean the same where every block sees the blocks
    before it clean (block-causal denoisers). ``fits(gen_length, block_length, calls)`` raises
    ValueError where the estimator's settings do not fit the decoding; ``calls`` are those of a
    rollout without anchors.
    """

    make_views: Callable[..., Views]
    reduce: Callable[[Tensor, Views], Tensor]
    num_views: Callable[[int, int, bool], int]
    num_shared: int = 0
    probability_of: str | None = None
    follows_steps: bool = False
    bound: bool = False
    exact_event: bool = False
    needs_updates: bool = False
    hides_prompt: bool = False
    replays: bool = False
    scores_visible: bool = False
    blockwise: bool = False
    fits: Callable[[int, int, int], None] = _fits_anything


def weighted_sum(view_logps: Float[Tensor, "B M L"], views: Views) -> Float[Tensor, "B L"]:
    """sum_m weight_m * log p_m."""
    return (view_logps * views.weight).sum(1)


def mask_view(rollout: Rollout, masked: Bool[Tensor, "B L"], mask_id: int) -> Int[Tensor, "B L"]:
    """The finished canvas with ``masked`` hidden, and everything after the first EOS hidden.

    Tokens after the first EOS are no part of the completion; the policy is scored as if it had
    never seen them. (While the row was decoded they were mostly open; an anchor there was visible.)
    """
    tail = completion_columns(rollout.ids, rollout.gen_length) & ~rollout.completion_mask
    return torch.where(masked | tail, mask_id, rollout.ids)


def maskable(rollout: Rollout, hide_anchors: bool) -> Bool[Tensor, "B L"]:
    """Completion tokens that a view may hide: the action tokens and, with ``hide_anchors``, the
    anchors among them.
    """
    return rollout.completion_mask & (rollout.action_mask | hide_anchors)


def stack_views(
    ids: Sequence[Tensor], weights: Sequence[Tensor], upper: Tensor | None = None
) -> Views:
    """Views from one (B, L) canvas and one (B, L) weight each."""
    return Views(
        ids=torch.stack(list(ids), 1),
        weight=torch.stack([w.float() for w in weights], 1),
        upper=upper,
    )


def position_uniform(
    rollout: Rollout, seed: int, *key: int, names: Tensor | None = None
) -> Float[Tensor, "B L"]:
    """A uniform per position, keyed by (seed, key, row id, distance from the canvas' end): the same
    in any batch.

    ``names`` (B,) stand in for the row ids, for instance group ids: rows of the same name draw the
    same.
    """
    names = rollout.row_ids if names is None else names
    length = rollout.ids.shape[1]
    from_end = torch.arange(length, 0, -1, device=rollout.ids.device)
    constants = [torch.full_like(names[:, None], k) for k in key]
    return counter_uniform(seed, *constants, names[:, None], from_end[None, :])


def row_uniform(rollout: Rollout, seed: int, *key: int) -> Float[Tensor, " B"]:
    """A uniform per row, keyed by (seed, key, row id)."""
    constants = [torch.full_like(rollout.row_ids, k) for k in key]
    return counter_uniform(seed, *constants, rollout.row_ids)


def smallest(
    keys: Float[Tensor, "B L"], candidates: Bool[Tensor, "B L"], count: Int[Tensor, " B"]
) -> Bool[Tensor, "B L"]:
    """The ``count`` candidates with the smallest keys in each row: a uniform subset if the keys are
    iid.
    """
    order = keys.masked_fill(~candidates, float("inf")).argsort(-1)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    return candidates & (rank < count[:, None])


def uniform_count(share: Float[Tensor, "*N"], size: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """n ~ U{1..size} from a uniform ``share``; 1 where size is 0. (A share of almost 1 may round
    up: clamped.)
    """
    return 1 + (share * size).floor().long().clamp(max=(size - 1).clamp(min=0))


def block_sizes(candidates: Bool[Tensor, "B L"], blocks: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """How many candidates each token's block has."""
    return torch.zeros_like(blocks).scatter_add(1, blocks, candidates.long()).gather(1, blocks)


def smallest_in_blocks(
    keys: Float[Tensor, "B L"],
    candidates: Bool[Tensor, "B L"],
    count: Int[Tensor, "B L"],
    blocks: Int[Tensor, "B L"],
) -> Bool[Tensor, "B L"]:
    """The ``count`` candidates with the smallest keys, all in (-1, 1), of each token's block."""
    order = (2 * blocks + keys).masked_fill(~candidates, float("inf")).argsort(-1)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))
    before = torch.zeros_like(blocks).scatter_add(1, blocks, candidates.long())
    before = (before.cumsum(-1) - before).gather(1, blocks)
    return candidates & (rank - before < count)


def largest(values: Int[Tensor, " B"]) -> int:
    """The maximum; 0 if there are no rows (a step in which no group is used)."""
    return int(values.max()) if len(values) else 0


def any_order_views(
    rollout: Rollout, mask_id: int, draws: Sequence[tuple[Tensor, Tensor]]
) -> Views:
    """Views of an any-order ELBO: each draw hides a subset M (B, L) of the candidates with weight
    (B,) or (B, L) on its scored tokens.

    Tokens that the exit call of temporal pruning filled are hidden in every draw and get one exact
    view of their own, in which everything else is visible (docs/theory.md, section 3). Exits of a
    block-causal row's blocks share it: each block sees those before it whole.
    """
    exits = rollout.exit_mask
    ids = [mask_view(rollout, subset | exits, mask_id) for subset, _ in draws]
    weights = [
        (subset & rollout.action_mask & ~exits) * (weight if weight.ndim > 1 else weight[:, None])
        for subset, weight in draws
    ]
    if bool(exits.any()):
        ids.append(mask_view(rollout, exits, mask_id))
        weights.append(finest(exits))
    return stack_views(ids, weights)


def any_order_candidates(rollout: Rollout, hide_anchors: bool) -> Bool[Tensor, "B L"]:
    """What the draws of an any-order ELBO choose from: maskable tokens that the exit call did not
    fill.
    """
    return maskable(rollout, hide_anchors) & ~rollout.exit_mask
