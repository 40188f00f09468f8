"""ESPO's coupled ELBO (arXiv 2512.03759, espo_trainer.py): a random subset and its complement, both
scored.

k ~ U{0..f} of the f free tokens are masked in one canvas, the other f - k in a second one:

    L = 1/2 [ (f + 1) / k * sum_{i in M} log p(y_i | M masked) + (f + 1) / (f - k) * sum_{i not in
    M} log p(y_i | rest masked) ]

(a term with an empty mask is 0). Unbiased for the any-order ELBO; exit tokens get their own exact
view, as in ``elbo``. ``num_mc`` pairs, as in ESPO; their counts are stratified within a row: one
uniform per stratum of pairs {k, f - k}. (ESPO's code stratifies over different rows, which does not
lower the variance of any one of them, and takes all L positions of the buffer for the f free
ones.) 2 * num_mc views. Nats.
"""

from __future__ import annotations

import torch

from ..rng import draw_seed
from ..types import Rollout, Views
from .base import (
    ONLY,
    Estimator,
    Update,
    any_order_candidates,
    any_order_views,
    position_uniform,
    row_uniform,
    smallest,
    weighted_sum,
)

_COUNT = 0
_SUBSET = 1


def espo(*, num_mc: int = 1, hide_anchors: bool = False) -> Estimator:
    """The ELBO from pairs of complementary masks. Nats."""
    if num_mc < 1:
        raise ValueError(f"num_mc must be at least 1, got {num_mc}")

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        seed = draw_seed(generator)
        candidates = any_order_candidates(rollout, hide_anchors)
        size = candidates.sum(-1)
        draws = []
        for k in range(num_mc):
            # k and f - k are one pair: half of the range
            share = (row_uniform(rollout, seed, _COUNT, k) + k) / num_mc / 2
            count = (share * (size + 1)).floor().long().clamp(max=size)
            subset = smallest(position_uniform(rollout, seed, _SUBSET, k), candidates, count)
            for part, number in ((subset, count), (candidates & ~subset, size - count)):
                draws.append((part, (size + 1) / (2 * num_mc * number.clamp(min=1))))
        return any_order_views(rollout, mask_id, draws)

    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: 2 * num_mc + has_exit,
        blockwise=True,
    )
