"""What every likelihood surrogate promises. A new one adds a line of keyword arguments to
SETTINGS.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conftest import seeded
from unmaskrl.core.estimators import ESTIMATORS, Update
from unmaskrl.core.types import Rollout, Views
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.testing import check_estimator
from unmaskrl.testing.cases import decoded, hand_made, tiny_model

SETTINGS = {
    "coupled": [{}, {"normalise": True, "hide_anchors": True}],
    "elbo": [
        {},
        {"num_mc": 1},
        {"num_mc": 2, "stratified": False},
        {"num_mc": 3, "hide_anchors": True},
        {"num_mc": 2, "antithetic": True},
        {"num_mc": 4, "antithetic": True, "stratified": False, "hide_anchors": True},
        {"visible": True},
    ],
    "espo": [{}, {"num_mc": 2, "hide_anchors": True}],
    "gauss": [{}, {"num_nodes": 2, "weight": "count", "hide_anchors": True}],
    "left_to_right": [{}, {"hide_anchors": True}],
    "mean_field": [{}, {"p_mask_prompt": 0.0}, {"hide_anchors": True}, {"share_prompt_mask": True}],
    "sandwich": [
        {"block_length": 2},
        {"num_mc": 3, "mask": "random", "hide_anchors": True},
        {"mix": 1.0, "block_length": 3},
    ],
    "trajectory": [{}, {"num_segments": 2}, {"shrink": 2, "p_mask_prompt": 0.3}],
    "two_mean_field": [{}, {"num_times": 2}],
    "unigrpo": [{}, {"num_steps": 4, "hide_anchors": True}],
}
ALL = [(name, kwargs) for name, settings in SETTINGS.items() for kwargs in settings]
EVERY = pytest.mark.parametrize(("name", "kwargs"), ALL, ids=str)
DENOISER = tiny_model()
MASK = DENOISER.mask_id
ON_EACH = pytest.mark.parametrize("make", [hand_made, decoded], ids=["hand-made", "decoded"])
Make = Callable[[ModelDenoiser], Rollout]


def is_random(name: str, kwargs: dict) -> bool:
    """Whether views depend on the generator at all."""
    return name != "left_to_right" and (
        name not in ("mean_field", "trajectory")
        or kwargs.get("p_mask_prompt", name == "mean_field") > 0
    )


def size_of(rollout: Rollout) -> tuple[int, int, bool]:
    return rollout.gen_length, int(rollout.nfe.max()), bool(rollout.exit_mask.any())


def views_of(name: str, kwargs: dict, rollout: Rollout, seed: int = 0) -> Views:
    """Of the second of three inner updates, with advantages of both signs by row id."""
    advantages = torch.where(rollout.row_ids % 3 == 0, 1.0, -1.0)
    update = Update(index=1, total=3, seed=5, advantages=advantages)
    return ESTIMATORS[name](**kwargs).make_views(rollout, MASK, seeded(seed), update)


def test_every_estimator_is_in_this_battery() -> None:
    assert set(SETTINGS) == set(ESTIMATORS)
    ended = decoded(DENOISER)
    # the battery sees both
    assert ended.exit_mask.any() and (ended.completion_mask.sum(-1) < 6).any()


@EVERY
def test_the_contract(name: str, kwargs: dict) -> None:
    check_estimator(ESTIMATORS[name], **kwargs)


def test_what_estimators_state_of_themselves() -> None:
    """The fields that recipes are checked by, for the defaults."""
    fields = (
        *("bound", "exact_event", "needs_updates", "hides_prompt", "replays", "scores_visible"),
    )
    stated = {
        name: {field for field in fields if getattr(make(), field)}
        for name, make in ESTIMATORS.items()
    }
    assert {name: found for name, found in stated.items() if found} == {
        "mean_field": {"hides_prompt"},
        "sandwich": {"bound"},
        "trajectory": {"exact_event", "replays"},
        "two_mean_field": {"replays"},
        "unigrpo": {"needs_updates"},
    }


@EVERY
@ON_EACH
def test_the_number_of_views_is_the_announced_cost(name: str, kwargs: dict, make: Make) -> None:
    rollout = make(DENOISER)
    estimator = ESTIMATORS[name](**kwargs)
    most = estimator.num_views(*size_of(rollout))
    found = views_of(name, kwargs, rollout).ids.shape[1]
    assert (
        found == min(most, int(rollout.action_mask.sum(-1).max()))
        if name == "left_to_right"
        else found == most
    )
    plain = rollout.rows(torch.tensor([0]))
    if not plain.exit_mask.any() and name != "left_to_right":
        assert views_of(name, kwargs, plain).ids.shape[1] == estimator.num_views(*size_of(plain))


@EVERY
@ON_EACH
def test_which_views_are_drawn(name: str, kwargs: dict, make: Make) -> None:
    rollout = make(DENOISER)
    first, other = (views_of(name, kwargs, rollout, seed) for seed in (3, 4))
    assert torch.equal(first.ids, other.ids) != is_random(name, kwargs)
