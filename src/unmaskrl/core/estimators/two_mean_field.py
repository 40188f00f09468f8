"""DiFFPO's two-times mean field (arXiv 2510.02212): the prompt alone up to a random call tau, the
rollout's latent after it.

    l_i = log p(y_i | q, z_0)    where the token was revealed by call tau or before
    l_i = log p(y_i | q, z_tau)  where it was revealed later

tau ~ U{0..T - 1} per row, T its calls, redrawn for every inner update; z_tau is the true latent.
tau = 0 is the mean field (without prompt masks); exact at tokens of the calls 1 and tau + 1.
``num_times`` m draws m distinct times (ours; the paper has one): m + 1 latents, and with m >= T
the exact replay. No prompt masks: they would break importance weights. Anchors are as visible as
they were (hence no ``hide_anchors``). m + 1 views, of which the fully masked one is shared by a
group. Nats. For block-causal denoisers T counts the calls of the longest block, and tau is a time
of every block.
"""

from __future__ import annotations

import torch

from ..rng import counter_uniform, draw_seed
from ..types import Rollout, Views
from .base import DRAW, ONLY, Estimator, Update, largest, weighted_sum
from .trajectory import latent_views


def two_mean_field(*, num_times: int = 1) -> Estimator:
    """Log-probs on z_0 and on the rollout's own latents at random times. Nats."""
    if num_times < 1:
        raise ValueError(f"num_times must be at least 1, got {num_times}")

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        times = _distinct_times(rollout, draw_seed(generator), num_times)
        return latent_views(rollout, mask_id, [torch.zeros_like(rollout.nfe), *times.unbind(1)])

    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: num_times + 1,
        num_shared=1,
        probability_of=DRAW,
        follows_steps=True,
        replays=True,
        blockwise=True,
    )


def _distinct_times(rollout: Rollout, seed: int, num_times: int) -> torch.Tensor:
    """(B, m) sorted times: a uniform m-subset of {0..T - 1}; where T < m, all of them and then T
    (whose segment is empty).
    """
    calls = rollout.num_local_steps
    most = max(num_times, largest(calls))
    call = torch.arange(most, device=rollout.ids.device)[None]
    keys = counter_uniform(seed, rollout.row_ids[:, None], call).masked_fill(
        call >= calls[:, None], float("inf")
    )
    order = keys.argsort(-1)[:, :num_times]
    return torch.minimum(order, calls[:, None]).sort(-1).values
