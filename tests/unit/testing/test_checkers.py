"""The checkers find what is wrong with an estimator or a loss, and say it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.own_parts import all_hidden, squared_ratio
from unmaskrl.core.estimators import ESTIMATORS, Estimator
from unmaskrl.core.estimators.base import ONLY
from unmaskrl.core.losses import LOSSES, PolicyLoss
from unmaskrl.core.types import LossOutputs, TrainBatch
from unmaskrl.testing import check_estimator, check_loss

GOOD = all_hidden()
LOSS = LOSSES["reinforce"]()


def with_views(change: Callable) -> Callable[[], Estimator]:
    """``all_hidden`` with other views: ``change(ids, weight, rollout, generator)`` edits copies."""

    def make_views(rollout, mask_id, generator, update=ONLY):
        views = GOOD.make_views(rollout, mask_id, generator, update)
        ids = views.ids.clone()
        weight = views.weight.clone()
        change(ids, weight, rollout, generator)
        return replace(views, ids=ids, weight=weight)

    return lambda: GOOD._replace(make_views=make_views)


def edits(ids, weight, rollout, generator) -> None:
    ids[:, 0, -1] = 5


def scores_all(ids, weight, rollout, generator) -> None:
    weight[:] = 1.0


def shows(ids, weight, rollout, generator) -> None:
    ids[:, 0] = torch.where(rollout.completion_mask, rollout.ids, ids[:, 0])


def shows_tail(ids, weight, rollout, generator) -> None:
    ids[:, 0] = torch.where(~rollout.completion_mask, rollout.ids, ids[:, 0])


def hides_pads(ids, weight, rollout, generator) -> None:
    ids[:, 0] = torch.where(rollout.attention_mask, ids[:, 0], 11)


def hides_anchors(ids, weight, rollout, generator) -> None:
    ids[:, 0] = torch.where(rollout.anchor_mask & rollout.completion_mask, 11, ids[:, 0])


def keyed_by_place(ids, weight, rollout, generator) -> None:
    weight *= torch.arange(1.0, len(weight) + 1)[:, None, None]


def negative(ids, weight, rollout, generator) -> None:
    weight.neg_()


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: "no estimator", "made a str, expected an Estimator"),
        (with_views(edits), "views only mask"),
        (with_views(scores_all), "shows; if that is meant, set scores_visible=True"),
        (with_views(shows), "set scores_visible=True"),
        (with_views(shows_tail), "set replays=True"),
        (with_views(hides_pads), "hides a left pad"),
        (with_views(hides_anchors), "anchors are hidden without a setting hide_anchors"),
        (with_views(keyed_by_place), "depend on the batch they are in"),
        (with_views(negative), "at least 0"),
        (
            lambda: GOOD._replace(num_views=lambda gen_length, nfe, has_exit: 0),
            "1 views where num_views announces 0",
        ),
        (
            lambda: GOOD._replace(reduce=lambda logps, views: logps.sum(1)),
            "reduce looks at log-probabilities that no view scores",
        ),
        (
            lambda: GOOD._replace(reduce=lambda logps, views: -(logps * views.weight).sum(1)),
            "set bound=True",
        ),
        (lambda: ESTIMATORS["two_mean_field"]()._replace(replays=False), "set replays=True"),
        (lambda: ESTIMATORS["elbo"](visible=True)._replace(scores_visible=False), "scores_visible"),
    ],
)
def test_what_is_wrong_with_an_estimator_is_said(factory: Callable, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_estimator(factory)


def test_an_estimator_that_draws_elsewhere_is_found() -> None:
    def noisy(ids, weight, rollout, generator) -> None:
        weight *= torch.rand(())

    with torch.random.fork_rng(), pytest.raises(AssertionError, match="gave other views"):
        check_estimator(with_views(noisy))


def changed(fn: Callable, **fields) -> Callable[[], PolicyLoss]:
    return lambda: LOSS._replace(fn=fn, **fields)


def mean_over_what_is_there(logps: Tensor, batch: TrainBatch) -> LossOutputs:
    mask = batch.action_mask
    gain = (batch.advantages[:, None] * logps * mask).sum() / mask.sum().clamp(min=1)
    return LossOutputs(loss=-gain, metrics={})


def over_all_tokens(logps: Tensor, batch: TrainBatch) -> LossOutputs:
    gain = (batch.advantages[:, None] * logps).sum() / batch.num_actions
    return LossOutputs(loss=-gain, metrics={})


def attached_metric(logps: Tensor, batch: TrainBatch) -> LossOutputs:
    out = LOSS.fn(logps, batch)
    return LossOutputs(loss=out.loss, metrics={"mine": out.loss})


def in_place(logps: Tensor, batch: TrainBatch) -> LossOutputs:
    out = LOSS.fn(logps, batch)
    batch.old_logps.add_(1.0)
    return out


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (lambda: None, "made a NoneType, expected a PolicyLoss"),
        (changed(over_all_tokens), "tokens that are no actions have a gradient"),
        (changed(mean_over_what_is_there), "do not add up|half the loss"),
        (changed(attached_metric), "metric mine must be a finite scalar without gradient"),
        (changed(in_place), "wrote to its inputs"),
        (lambda: LOSSES["token_clip"]()._replace(uses_old=False), "uses_old is False"),
        (lambda: LOSSES["token_clip"]()._replace(uses_ref=False), "uses_ref is False|uses_ref"),
        (
            lambda: LOSSES["token_clip"](is_cap=2.0)._replace(uses_behavior=False),
            "uses_behavior is False",
        ),
        (lambda: squared_ratio()._replace(kl_coef=0.0), "rows without advantage have a gradient"),
    ],
)
def test_what_is_wrong_with_a_loss_is_said(factory: Callable, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_loss(factory)
