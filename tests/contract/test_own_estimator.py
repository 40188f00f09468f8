"""examples/own_estimator: the contract, its expectation by enumeration, and its two limits."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import same_maths, seeded
from tests.exact import CASES, Case, any_order_elbo, every_order, log_p
from unmaskrl.core.estimators import left_to_right
from unmaskrl.core.scoring import token_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.testing import check_estimator
from unmaskrl.testing.cases import hand_made, tiny_model
from unmaskrl.utils.imports import load_object

FILE = Path(__file__).parents[2] / "examples" / "own_estimator" / "own_estimator.py"
block_elbo = load_object(f"{FILE}:block_elbo", "estimator.name")
MODULE = sys.modules[block_elbo.__module__]


@pytest.mark.parametrize("block_length", [2, 3, 6])
def test_it_keeps_the_contract(block_length: int) -> None:
    check_estimator(block_elbo, block_length=block_length)
    check_estimator(block_elbo, block_length=block_length, num_mc=2)


def block_by_block(toy: ToyDenoiser, case: Case, block_length: int) -> Tensor:
    """Mean over the orders that end each block before the next one; then the exit in one pass."""
    orders = [
        order
        for order in itertools.permutations(case.rest)
        if all(a // block_length <= b // block_length for a, b in itertools.pairwise(order))
    ]
    steps = [
        log_p(toy, case, set(case.anchors) | set(order[:i]), position)
        for order in orders
        for i, position in enumerate(order)
    ]
    known = set(case.anchors) | set(case.rest)
    exits = [log_p(toy, case, known, position) for position in case.exits]
    return torch.stack([*steps, torch.zeros(())]).sum() / len(orders) + sum(exits)


@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.hide_anchors])
def test_its_mean_over_every_draw_is_that_over_the_orders_of_decoding(
    name: str, block_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    toy = case.toy()
    draws = every_order([0, 1, 2, 3], pieces=12)
    rollout = case.rollout(len(draws.orders))
    monkeypatch.setattr(MODULE, "row_uniform", lambda *_: draws.share)
    monkeypatch.setattr(MODULE, "position_uniform", lambda *_: draws.keys)
    want = block_by_block(toy, case, block_length)
    for num_mc in (1, 2):
        estimator = block_elbo(block_length=block_length, num_mc=num_mc)
        views = estimator.make_views(rollout, toy.mask_id, seeded())
        got = token_logps(toy, rollout, estimator, views).sum(-1).mean()
        # weights of up to 4 tokens, stored in fp32
        assert same_maths(got.float(), want, 4 * float(want.abs()))
    if block_length == 4:
        assert same_maths(want, any_order_elbo(toy, case))


def test_blocks_of_one_token_are_read_from_left_to_right() -> None:
    denoiser = tiny_model()
    rollout = hand_made(denoiser)
    rollout = rollout.rows((~rollout.exit_mask.any(-1)).nonzero().squeeze(-1))
    scores = [
        token_logps(denoiser, rollout, e, e.make_views(rollout, denoiser.mask_id, seeded()))
        for e in (block_elbo(block_length=1), left_to_right())
    ]
    assert same_maths(scores[0], scores[1]) and bool((scores[0] < 0).any())


def test_another_block_length_than_decodings_is_one_line() -> None:
    with pytest.raises(ValueError, match="decoded in blocks of 12; set it to decode"):
        block_elbo(block_length=8).fits(24, 12, 24)
