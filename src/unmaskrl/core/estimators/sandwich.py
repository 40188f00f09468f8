"""SPG's sandwiched bounds (arXiv 2510.09541, spg_trainer.py): a lower bound raises good rows, an
upper bound lowers bad ones.

K = ``num_mc`` draws hide M_k, t_k = |M_k| / f of the f free tokens, S = tokens hidden at least
once:

    lower_i = (1/K) sum_k 1[i in M_k] / t_k * log p(y_i | M_k masked)
    upper_i = f / (beta |S|) * log( (1/K) sum_k 1[i in M_k] / t_k * p(y_i | M_k masked) ** beta ),
        i in S
    l_i     = lower_i where A >= 0, else mix * upper_i + (1 - mix) * lower_i

Their sums are f times the paper's per-token means, so loss ``reinforce`` with normaliser ``token``
is SPG's objective. ``mask="random"``: uniform counts, so that the lower one is the ELBO (not
exactly with ``hide_anchors``: draws that hide nothing but anchors score nothing). ``mask="block"``
(published): K distinct blocks; in each, a uniform count is hidden, what comes later is hidden, and
what came before (prompt included) with probability ``p_mask_context``, drawn anew for each block;
every hidden token counts. (The published code draws blocks modulo the row's number of blocks, which
may repeat one.) mix 1 is SPG w/ EUBO, 0.5 its mixture, 0 the ELBO alone. K views. Nats.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..rng import counter_uniform, draw_seed
from ..types import Rollout, Views
from .base import (
    ONLY,
    Estimator,
    Update,
    mask_view,
    maskable,
    position_uniform,
    row_uniform,
    smallest,
    stack_views,
    uniform_count,
    weighted_sum,
)
from .mean_field import check_p_mask

_COUNT = 0
_SUBSET = 1
_BLOCK = 2
_CONTEXT = 3


def sandwich(
    *,
    num_mc: int = 2,
    mix: float = 0.5,
    beta: float = 1.5,
    mask: str = "block",
    block_length: int = 32,
    p_mask_context: float = 0.15,
    hide_anchors: bool = False,
) -> Estimator:
    """ELBO for rows with A >= 0, evidence upper bound or a mixture for the others. Nats."""
    check_p_mask(p_mask_context, "p_mask_context")
    _check_settings(num_mc, mix, beta, mask, block_length)

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        seed = draw_seed(generator)
        candidates = maskable(rollout, hide_anchors)
        actions = rollout.action_mask
        subsets = [
            _random_subset(rollout, candidates, seed, k, num_mc)
            if mask == "random"
            else _block_subset(rollout, candidates, seed, k, block_length, p_mask_context)
            for k in range(num_mc)
        ]
        noise = p_mask_context if mask == "block" else 0.0
        ids = []
        weights = []
        for k, subset in enumerate(subsets):
            scored = subset & actions
            rate = scored.sum(-1).clamp(min=1) / actions.sum(-1).clamp(min=1)
            prompt = rollout.prompt_mask & (position_uniform(rollout, seed, _CONTEXT, k) < noise)
            ids.append(mask_view(rollout, subset | prompt, mask_id))
            weights.append(scored / (rate * num_mc)[:, None])
        advantages = (
            torch.zeros(len(actions), device=actions.device)
            if update.advantages is None
            else update.advantages
        )
        return stack_views(ids, weights, upper=mix * (advantages < 0).float())

    def reduce(view_logps: Float[Tensor, "B M L"], views: Views) -> Float[Tensor, "B L"]:
        lower = weighted_sum(view_logps, views)
        if views.upper is None or not bool(views.upper.any()):
            return lower
        share = views.upper.to(lower.dtype)[:, None]
        return share * _upper_bound(view_logps, views, beta) + (1 - share) * lower

    def fits(gen_length: int, decode_block_length: int, calls: int) -> None:
        if mask == "block" and gen_length % block_length:
            raise ValueError(
                f"estimator.block_length {block_length} does not divide decode.gen_length "
                f"{gen_length}: SPG hides whole blocks; use decode's ({decode_block_length}), or "
                "estimator.mask=random"
            )

    return Estimator(
        make_views, reduce, lambda gen_length, nfe, has_exit: num_mc, bound=True, fits=fits
    )


def _check_settings(num_mc: int, mix: float, beta: float, mask: str, block_length: int) -> None:
    if num_mc < 1 or block_length < 1 or beta <= 0:
        raise ValueError(
            f"need num_mc, block_length >= 1 and beta > 0, got {num_mc}, {block_length} and {beta}"
        )
    if not 0 <= mix <= 1:
        raise ValueError(f"mix is the upper bound's share, in [0, 1]; got {mix}")
    if mask not in ("block", "random"):
        raise ValueError(f"mask must be 'block' or 'random', got {mask!r}")


def _random_subset(
    rollout: Rollout, candidates: Tensor, seed: int, k: int, num_mc: int
) -> Bool[Tensor, "B L"]:
    """n ~ U{1..|C|}, stratified over the draws of a row (one uniform per stratum), and a uniform
    n-subset.
    """
    share = (row_uniform(rollout, seed, _COUNT, k) + k) / num_mc
    return smallest(
        position_uniform(rollout, seed, _SUBSET, k),
        candidates,
        uniform_count(share, candidates.sum(-1)),
    )


def _block_subset(
    rollout: Rollout,
    candidates: Tensor,
    seed: int,
    k: int,
    block_length: int,
    p_mask_context: float,
) -> Bool[Tensor, "B L"]:
    """Some tokens of the k-th of the row's blocks in random order (round again if there are fewer),
    and all later ones.
    """
    rows, length = candidates.shape
    offset = torch.arange(length, device=candidates.device) - (length - rollout.gen_length)
    block = (offset // block_length).clamp(min=0).expand(rows, -1)
    num_blocks = -(-rollout.gen_length // block_length)
    used = (
        torch.zeros(rows, num_blocks, device=block.device).scatter_add(1, block, candidates.float())
        > 0
    )
    names = torch.arange(num_blocks, device=block.device)[None]
    keys = counter_uniform(
        seed, torch.full_like(rollout.row_ids, _BLOCK)[:, None], rollout.row_ids[:, None], names
    )
    order = keys.masked_fill(~used, float("inf")).argsort(-1)
    chosen = order.gather(1, (k % used.sum(-1).clamp(min=1))[:, None])
    inside = candidates & (block == chosen)
    count = uniform_count(row_uniform(rollout, seed, _COUNT, k), inside.sum(-1))
    picked = smallest(position_uniform(rollout, seed, _SUBSET, k), inside, count)
    before = (block < chosen) & (position_uniform(rollout, seed, _CONTEXT, k) < p_mask_context)
    return picked | (candidates & ((block > chosen) | before))


def _upper_bound(
    view_logps: Float[Tensor, "B M L"], views: Views, beta: float
) -> Float[Tensor, "B L"]:
    """f / (beta |S|) * log sum_k weight_k p_k ** beta at tokens scored at least once; weight_k = 1
    / (K t_k).
    """
    scored = views.weight != 0
    once = scored.any(1)
    terms = torch.where(
        scored, beta * view_logps + views.weight.clamp(min=1e-30).log(), float("-inf")
    )
    value = torch.where(once, torch.where(once[:, None], terms, 0.0).logsumexp(1), 0.0)
    # f from any draw: weight = f / (|M_k| K)
    free = (views.weight.amax(-1) * scored.sum(-1)).amax(-1) * views.weight.shape[1]
    return value * (free / (beta * once.sum(-1).clamp(min=1)))[:, None]
