"""``check_estimator``: what scoring and training ask of a likelihood surrogate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.estimators import Estimator, Update
from ..core.losses import token_clip
from ..core.scoring import backward_in_chunks, token_logps, view_logps
from ..core.types import Rollout, TrainBatch, Views, completion_columns
from ..models.denoiser import ModelDenoiser
from .cases import decoded, hand_made, seeded, tiny_model
from .require import ROUNDING, close, nothing_drawn, require

_SEEDS = 5


def check_estimator(factory: Callable[..., Estimator], **settings: Any) -> None:
    """AssertionError unless ``factory(**settings)`` keeps every promise of an ``Estimator``.

    Views only mask, and score only masked action tokens (unless ``scores_visible``); what lies
    behind the first EOS is hidden (unless ``replays``); anchors are hidden only by
    ``hide_anchors``; there are at most ``num_views``; views come from the generator alone, and a
    row's do not depend on its batch. ``reduce`` looks at what views score alone; ratios are 1 at
    unchanged weights; gradients of chunks add up; rows and batches without a token to score are
    silent.
    """
    denoiser = tiny_model()
    with nothing_drawn("the estimator"):
        estimator = factory(**settings)
        require(
            isinstance(estimator, Estimator),
            f"the factory made a {type(estimator).__name__}, expected an Estimator",
        )
        hides = _hides_anchors(factory, settings)
        for rollout in (hand_made(denoiser), decoded(denoiser)):
            kept = rollout.ids.clone()
            _check_views(estimator, rollout, denoiser.mask_id, hides)
            _check_source(estimator, rollout, denoiser.mask_id)
            _check_rows(estimator, rollout, denoiser.mask_id)
            _check_scores(estimator, rollout, denoiser)
            require(torch.equal(kept, rollout.ids), "make_views wrote to the rollout it was given")
        _check_gradient(estimator, denoiser)
        _check_silence(estimator, denoiser)


def _hides_anchors(factory: Callable[..., Estimator], settings: dict[str, Any]) -> bool:
    known = inspect.signature(factory).parameters.get("hide_anchors")
    return bool(settings.get("hide_anchors", known is not None and known.default is True))


def _views(estimator: Estimator, rollout: Rollout, mask_id: int, seed: int = 0) -> Views:
    """Of the second of three inner updates, with advantages of both signs by row id."""
    advantages = torch.where(rollout.row_ids % 3 == 0, 1.0, -1.0)
    update = Update(index=1, total=3, seed=5, advantages=advantages)
    return estimator.make_views(rollout, mask_id, seeded(seed), update)


def _check_views(estimator: Estimator, rollout: Rollout, mask_id: int, hides: bool) -> None:
    tail = completion_columns(rollout.ids, rollout.gen_length) & ~rollout.completion_mask
    anchors = rollout.anchor_mask & rollout.completion_mask
    most = estimator.num_views(
        rollout.gen_length, int(rollout.nfe.max()), bool(rollout.exit_mask.any())
    )
    any_anchor_hidden = False
    for seed in range(_SEEDS):
        views = _views(estimator, rollout, mask_id, seed)
        ids = views.ids
        edited = ids != rollout.ids[:, None]
        scored = views.weight != 0
        require(bool((ids[edited] == mask_id).all()), "a view edits a token: views only mask")
        require(bool(scored.any()), "no token is scored")
        require(
            estimator.scores_visible or bool((ids[scored] == mask_id).all()),
            "a view scores a token that it shows; if that is meant, set scores_visible=True",
        )
        require(
            not bool((scored & ~rollout.action_mask[:, None]).any()),
            "a token is scored that is no action (prompt, pad, anchor, or behind the first EOS)",
        )
        require(
            views.weight.dtype == torch.float32
            and bool((views.weight >= 0).all())
            and bool(torch.isfinite(views.weight).all()),
            "weights must be float32, finite and at least 0",
        )
        require(
            not bool((edited & ~rollout.attention_mask[:, None]).any()), "a view hides a left pad"
        )
        require(
            estimator.replays or bool((ids[tail[:, None].expand_as(ids)] == mask_id).all()),
            "a view shows what lies behind the first EOS; if views are the rollout's own latents, "
            "set replays=True",
        )
        require(
            ids.shape[1] <= most,
            f"{ids.shape[1]} views where num_views announces {most}: the cost would be wrong",
        )
        any_anchor_hidden |= bool(((ids == mask_id) & anchors[:, None]).any())
    require(
        hides or not any_anchor_hidden,
        "anchors are hidden without a setting hide_anchors that is true",
    )
    require(not hides or any_anchor_hidden, "hide_anchors is true and no anchor is ever hidden")


def _check_source(estimator: Estimator, rollout: Rollout, mask_id: int) -> None:
    first = _views(estimator, rollout, mask_id, 3)
    again = _views(estimator, rollout, mask_id, 3)
    require(
        torch.equal(first.ids, again.ids) and torch.equal(first.weight, again.weight),
        "the same generator seed gave other views: draw from the generator alone",
    )
    others = [_views(estimator, rollout, mask_id, seed).ids for seed in range(4, 4 + _SEEDS)]
    if all(torch.equal(first.ids, ids) for ids in others):
        return  # nothing is drawn
    generator = seeded(3)
    calls = [estimator.make_views(rollout, mask_id, generator).ids for _ in range(1 + _SEEDS)]
    require(
        not all(torch.equal(calls[0], ids) for ids in calls[1:]),
        "the generator did not move on: inner updates would share their masks",
    )


def _check_rows(estimator: Estimator, rollout: Rollout, mask_id: int) -> None:
    whole = _views(estimator, rollout, mask_id)
    for rows in ([2], [1, 0], [5, 3, 1]):
        part = _views(estimator, rollout.rows(torch.tensor(rows)), mask_id)
        count = part.ids.shape[1]  # a batch without exit tokens has no view for them
        require(
            torch.equal(part.ids, whole.ids[rows, :count])
            and torch.equal(part.weight, whole.weight[rows, :count])
            and not bool(whole.weight[rows, count:].any()),
            f"views of rows {rows} depend on the batch they are in: key draws by row id "
            "(position_uniform, row_uniform)",
        )


def _check_scores(estimator: Estimator, rollout: Rollout, denoiser: ModelDenoiser) -> None:
    views = _views(estimator, rollout, denoiser.mask_id)
    logps = token_logps(denoiser, rollout, estimator, views)
    require(bool(torch.isfinite(logps).all()), "a token's score is not finite")
    require(
        not bool(logps[~rollout.action_mask].any()), "a token that is no action has a score not 0"
    )
    require(
        estimator.bound or bool((logps.detach() <= 0).all()),
        "a log-probability is above 0; if scores are bounds, set bound=True",
    )
    again = token_logps(denoiser, rollout, estimator, views)
    out = token_clip()(logps, _batch(rollout, again))
    require(
        bool(out.metrics["ratio/max_dev"] == 0), "at unchanged weights the ratio is not exactly 1"
    )
    seen = view_logps(denoiser, rollout, views).detach()
    spoiled = torch.where(views.weight != 0, seen, 123.0)
    require(
        torch.equal(estimator.reduce(spoiled, views), estimator.reduce(seen, views)),
        "reduce looks at log-probabilities that no view scores (weight 0)",
    )


def _check_gradient(estimator: Estimator, denoiser: ModelDenoiser) -> None:
    rollout = hand_made(denoiser)
    views = _views(estimator, rollout, denoiser.mask_id)
    batch = _batch(rollout, token_logps(denoiser, rollout, estimator, views) + 0.05)
    whole = _gradient(estimator, denoiser, rollout, views, batch, 10**6)
    for limit in (1, 3):
        part = _gradient(estimator, denoiser, rollout, views, batch, limit)
        # advantages of both signs cancel: what was added up is larger than the sum
        require(
            close(part, whole, 8 * ROUNDING),
            f"gradients of chunks of {limit} canvases do not add up to the whole one: reduce must "
            "treat rows one by one",
        )


def _gradient(
    estimator: Estimator,
    denoiser: ModelDenoiser,
    rollout: Rollout,
    views: Views,
    batch: TrainBatch,
    limit: int,
) -> Tensor:
    backward_in_chunks(
        denoiser,
        rollout,
        estimator,
        views,
        lambda logps: token_clip()(logps, batch),
        max_canvases=limit,
    )
    parameters = list(denoiser.model.parameters())
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    denoiser.model.zero_grad()
    return found


def _check_silence(estimator: Estimator, denoiser: ModelDenoiser) -> None:
    rollout = hand_made(denoiser).rows(torch.tensor([4, 4]))
    views = _views(estimator, rollout, denoiser.mask_id)
    require(
        not bool(views.weight.any())
        and not bool(token_logps(denoiser, rollout, estimator, views).any()),
        "rows without an action are scored",
    )
    nothing = hand_made(denoiser).rows(torch.tensor([], dtype=torch.int64))
    views = _views(estimator, nothing, denoiser.mask_id)
    require(
        views.ids.shape[0] == 0
        and views.ids.shape == views.weight.shape
        and estimator.reduce(views.weight.double(), views).shape == nothing.ids.shape,
        "a batch without rows must give views without rows, of the canvas' length",
    )


def _batch(rollout: Rollout, old: Tensor) -> TrainBatch:
    mask = rollout.action_mask
    old = old.detach()
    rows = float(mask.any(-1).sum())
    tokens = float(mask.sum())
    return TrainBatch(
        action_mask=mask,
        advantages=torch.linspace(-1, 1, len(mask), dtype=old.dtype),
        old_logps=old,
        ref_logps=old,
        behavior_logps=old,
        progress=torch.ones_like(old),
        group_actions=mask.sum(-1).to(old.dtype),
        num_actions=tokens,
        num_rows=rows,
        num_groups=rows,
        num_scored=tokens,
    )
