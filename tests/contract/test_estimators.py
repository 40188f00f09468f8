"""What every likelihood surrogate promises. A new one adds a line of keyword arguments to
SETTINGS.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import ROUNDING, finished_rollout, same_maths, seeded, tiny_llada, train_batch
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import ESTIMATORS, Update
from unmaskrl.core.losses import token_clip
from unmaskrl.core.scoring import backward_in_chunks, token_logps, view_logps
from unmaskrl.core.types import Rollout, TrainBatch, Views, completion_columns

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
DENOISER = tiny_llada()
MASK = DENOISER.mask_id
EOS = DENOISER.eos_id
MIDDLE = Update(
    index=1, total=3, seed=5, advantages=torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0, 1.0, -1.0])
)


def scores_visible(name: str, kwargs: dict) -> bool:
    """Declared breach: STP's published surrogate scores tokens that the canvas shows."""
    return name == "elbo" and kwargs.get("visible", False)


def is_replay(name: str) -> bool:
    """Declared breach: true latents show what was decoded behind the first EOS."""
    return name in ("trajectory", "two_mean_field")


def is_random(name: str, kwargs: dict) -> bool:
    """Whether views depend on the generator at all."""
    return name != "left_to_right" and (
        name not in ("mean_field", "trajectory")
        or kwargs.get("p_mask_prompt", name == "mean_field") > 0
    )


def size_of(rollout: Rollout) -> tuple[int, int, bool]:
    return rollout.gen_length, int(rollout.nfe.max()), bool(rollout.exit_mask.any())


def hand_made() -> Rollout:
    """Left pads; free, anchored, ended early, ended with an anchor behind, nothing free, exit
    rows.
    """
    return finished_rollout(
        [
            [1, 2, 3, 4],
            [1, 2, 3, 4],
            [1, EOS, EOS, EOS],
            [1, EOS, 3, EOS],
            [1, 2, 3, 4],
            [1, 2, 3, 4],
            [EOS] * 4,
        ],
        [
            [1, 2, 3, 4],
            [0, 1, 0, 2],
            [1, 2, 3, 3],
            [1, 2, 0, 3],
            [0, 0, 0, 0],
            [1, 2, 3, 3],
            [1, 2, 2, 2],
        ],
        eos_id=EOS,
        pad_id=DENOISER.pad_id,
        prompt=3,
        left_pad=2,
        exit_step=[0, 0, 0, 0, 0, 3, 0],
    )


def decoded() -> Rollout:
    canvas = anchored_canvas(
        [[1, 2, 3, 4], [5], [6, 7]] * 4,
        [{}, {0: 2, 3: 3}, {5: 1}] * 4,
        gen_length=6,
        denoiser=DENOISER,
    )
    options = {
        "block_length": 3,
        "steps": 6,
        "select": "entropy",
        "temperature": 1.0,
        "exit_at": 0.7,
    }
    return decode(DENOISER, canvas, generator=seeded(1), **options)


ROLLOUTS = {"hand-made": hand_made, "decoded": decoded}
ON_EACH = pytest.mark.parametrize(
    "rollout", [make() for make in ROLLOUTS.values()], ids=list(ROLLOUTS)
)


def test_every_estimator_is_in_this_battery() -> None:
    assert set(SETTINGS) == set(ESTIMATORS)
    ended = decoded()
    # the battery sees both
    assert ended.exit_mask.any() and (ended.completion_mask.sum(-1) < 6).any()


def views_of(name: str, kwargs: dict, rollout: Rollout, seed: int = 0) -> Views:
    return ESTIMATORS[name](**kwargs).make_views(rollout, MASK, seeded(seed), update_for(rollout))


def update_for(rollout: Rollout) -> Update:
    """The second of three inner updates, with advantages of both signs by row id."""
    return MIDDLE._replace(advantages=torch.where(rollout.row_ids % 3 == 0, 1.0, -1.0))


@EVERY
@ON_EACH
def test_views_only_mask_and_score_only_masked_action_tokens(
    name: str, kwargs: dict, rollout: Rollout
) -> None:
    for seed in range(5):
        views = views_of(name, kwargs, rollout, seed)
        edited = views.ids != rollout.ids[:, None]
        assert (views.ids[edited] == MASK).all()
        scored = views.weight != 0
        assert scored.any()
        assert (views.ids[scored] == MASK).all() or scores_visible(name, kwargs)
        assert (rollout.action_mask[:, None] | ~scored).all()
        assert (views.weight >= 0).all() and torch.isfinite(views.weight).all()
        assert views.weight.dtype == torch.float32
        # Never scored: prompt, pads, anchors, what lies behind the first EOS. Pads are not even
        # hidden.
        for never in (
            rollout.prompt_mask,
            ~rollout.attention_mask,
            rollout.anchor_mask,
            ~rollout.completion_mask,
        ):
            assert not (scored & never[:, None]).any()
        assert not (edited & ~rollout.attention_mask[:, None]).any()


@EVERY
@ON_EACH
def test_what_is_behind_the_first_eos_is_hidden_in_every_view(
    name: str, kwargs: dict, rollout: Rollout
) -> None:
    tail = completion_columns(rollout.ids, rollout.gen_length) & ~rollout.completion_mask
    ids = views_of(name, kwargs, rollout).ids
    assert tail.any()
    assert bool((ids[tail[:, None].expand_as(ids)] == MASK).all()) != is_replay(name)


@EVERY
@ON_EACH
def test_anchors_are_hidden_only_on_request(name: str, kwargs: dict, rollout: Rollout) -> None:
    given = (rollout.anchor_mask & rollout.completion_mask)[:, None]
    hidden = torch.stack(
        [((views_of(name, kwargs, rollout, s).ids == MASK) & given).any() for s in range(5)]
    )
    assert bool(hidden.any()) == kwargs.get("hide_anchors", False)


@EVERY
@ON_EACH
def test_the_number_of_views_is_the_announced_cost(
    name: str, kwargs: dict, rollout: Rollout
) -> None:
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
def test_views_come_from_the_generator_alone(name: str, kwargs: dict, rollout: Rollout) -> None:
    first, again, other = (views_of(name, kwargs, rollout, seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.weight, again.weight)
    assert torch.equal(first.ids, other.ids) != is_random(name, kwargs)
    generator = seeded(3)
    estimator = ESTIMATORS[name](**kwargs)
    one, two = (
        estimator.make_views(rollout, MASK, generator, update_for(rollout)) for _ in range(2)
    )
    assert torch.equal(one.ids, first.ids)
    # a generator moves on: inner updates get their own masks
    assert torch.equal(two.ids, one.ids) != is_random(name, kwargs)


@EVERY
@ON_EACH
def test_views_of_a_row_do_not_depend_on_its_batch(
    name: str, kwargs: dict, rollout: Rollout
) -> None:
    whole = views_of(name, kwargs, rollout)
    for rows in ([2], [1, 0], [5, 3, 1]):
        part = views_of(name, kwargs, rollout.rows(torch.tensor(rows)))
        num_views = part.ids.shape[1]  # a batch without exit tokens has no view for them
        assert torch.equal(part.ids, whole.ids[rows, :num_views])
        assert torch.equal(part.weight, whole.weight[rows, :num_views])
        assert (whole.weight[rows, num_views:] == 0).all()


def batch_for(rollout: Rollout, logps: Tensor) -> TrainBatch:
    mask = rollout.action_mask
    advantages = torch.linspace(-1, 1, len(mask), dtype=logps.dtype)
    return train_batch(mask, advantages, logps.detach(), logps.detach())


@EVERY
@ON_EACH
def test_ratios_are_exactly_1_at_unchanged_weights(
    name: str, kwargs: dict, rollout: Rollout
) -> None:
    estimator = ESTIMATORS[name](**kwargs)
    views = views_of(name, kwargs, rollout)
    logps = token_logps(DENOISER, rollout, estimator, views)
    assert torch.isfinite(logps).all()
    assert (logps.detach() <= 0).all() or name == "sandwich"  # its upper bound may exceed 0
    assert (logps[~rollout.action_mask] == 0).all()
    out = token_clip()(logps, batch_for(rollout, token_logps(DENOISER, rollout, estimator, views)))
    assert out.metrics["ratio/max_dev"] == 0
    assert float(out.metrics["ratio/mean"]) == pytest.approx(1.0)
    assert out.metrics["kl/ref"] == out.metrics["kl/old"] == out.metrics["ratio/clip_frac"] == 0


@EVERY
@pytest.mark.parametrize("max_canvases", [1, 3])
def test_the_chunked_gradient_is_the_full_one(name: str, kwargs: dict, max_canvases: int) -> None:
    rollout = hand_made()
    estimator = ESTIMATORS[name](**kwargs)
    views = views_of(name, kwargs, rollout)
    batch = batch_for(rollout, token_logps(DENOISER, rollout, estimator, views) + 0.05)

    def gradient(limit: int) -> list[Tensor]:
        backward_in_chunks(
            DENOISER,
            rollout,
            estimator,
            views,
            lambda x: token_clip()(x, batch),
            max_canvases=limit,
        )
        grads = [p.grad.clone() for p in DENOISER.model.parameters()]
        DENOISER.model.zero_grad()
        return grads

    full = gradient(10**6)
    chunked = gradient(max_canvases)
    largest = max(float(g.abs().max()) for g in full)
    assert largest > 1e-3
    # advantages of both signs cancel: what was added up is larger than the sum
    units = 8 * ROUNDING
    assert all(
        same_maths(c, f, size=largest, units=units) for c, f in zip(chunked, full, strict=True)
    )


@EVERY
def test_rows_without_actions_are_finite_and_silent(name: str, kwargs: dict) -> None:
    rollout = hand_made().rows(torch.tensor([4, 4]))
    assert not rollout.action_mask.any()
    estimator = ESTIMATORS[name](**kwargs)
    views = views_of(name, kwargs, rollout)
    assert (views.weight == 0).all()
    assert (token_logps(DENOISER, rollout, estimator, views) == 0).all()


@EVERY
@ON_EACH
def test_reduce_uses_only_what_views_score(name: str, kwargs: dict, rollout: Rollout) -> None:
    estimator = ESTIMATORS[name](**kwargs)
    views = views_of(name, kwargs, rollout)
    logps = view_logps(DENOISER, rollout, views).detach()
    spoiled = torch.where(views.weight != 0, logps, 123.0)
    assert torch.equal(estimator.reduce(spoiled, views), estimator.reduce(logps, views))


@EVERY
def test_a_step_without_rows_has_views(name: str, kwargs: dict) -> None:
    """All groups flat and no KL term: nothing to score, and nothing breaks."""
    rollout = hand_made().rows(torch.tensor([], dtype=torch.int64))
    estimator = ESTIMATORS[name](**kwargs)
    views = views_of(name, kwargs, rollout)
    assert views.ids.shape[0] == 0 and views.ids.shape == views.weight.shape
    assert estimator.reduce(views.weight.double(), views).shape == rollout.ids.shape
