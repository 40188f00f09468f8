"""Supervised loss and likelihoods of given answers on a block-causal denoiser, by enumeration."""

from __future__ import annotations

from typing import Any

import torch

from tests.block_rows import PROMPTS, decoded, exact_elbo, toy
from tests.conftest import rounded, seeded
from unmaskrl.core.estimators import elbo
from unmaskrl.core.scoring import frozen_token_logps
from unmaskrl.evaluation.continuation import given_rollout, greedy_matches
from unmaskrl.training.sft.loss import masked_loss


def test_the_loss_is_the_elbo_of_blocks_per_token() -> None:
    """Its mean over masks is minus the exact ELBO of each block over the completion's length."""
    den = toy(3)
    rollout = decoded(den, gen_length=4)
    first = rollout.ids.shape[1] - rollout.gen_length
    for row in range(len(PROMPTS)):
        prompts = rollout.ids[row : row + 1, :first]
        mask = rollout.prompt_mask[row : row + 1, :first]
        completion = rollout.ids[row : row + 1, first : first + 4]
        copies = 500
        many = [t.expand(copies, -1) for t in (prompts, mask, completion)]
        draws: Any = [float(masked_loss(den, *many, seeded(s))) for s in range(8)]  # type: ignore[arg-type]
        values = torch.tensor(draws, dtype=torch.float64)
        exact = -exact_elbo(den, rollout, row) / 4
        error = float(values.std()) / 8**0.5
        assert abs(float(values.mean()) - exact) < 6 * error + 1e-3 * abs(exact)


def test_parts_of_a_batch_sum_to_its_loss() -> None:
    den = toy(2)
    rollout = decoded(den, gen_length=4)
    first = rollout.ids.shape[1] - rollout.gen_length
    batch = (
        rollout.ids[:, :first],
        rollout.prompt_mask[:, :first],
        rollout.ids[:, first : first + 4],
    )
    whole = masked_loss(den, *batch, seeded(1))
    parts = [masked_loss(den, *batch, seeded(1), slice(i, i + 2)) for i in (0, 2, 4)]
    assert float(sum(parts)) == rounded(float(whole), size=100.0, dtype=torch.float64)


def test_likelihoods_of_given_answers() -> None:
    den: Any = toy(3)
    den.device = torch.device("cpu")
    rollout = decoded(den, gen_length=4)
    first = rollout.ids.shape[1] - rollout.gen_length
    pairs = [(p, rollout.ids[i, first : first + 4].tolist()) for i, p in enumerate(PROMPTS)]
    given = given_rollout(den, pairs)
    est = elbo(num_mc=400)
    views = est.make_views(given, den.mask_id, seeded(0))
    values = frozen_token_logps(den, given, est, views, max_canvases=10**6).sum(-1)
    for row, value in enumerate(values.tolist()):
        exact = exact_elbo(den, rollout, row)
        assert abs(value - exact) < 0.1 * abs(exact)
    greedy = greedy_matches(den, pairs, batch_size=2)
    assert greedy == [greedy_matches(den, [pair], batch_size=1)[0] for pair in pairs]
