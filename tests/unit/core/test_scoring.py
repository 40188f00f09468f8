"""Chunked scoring and chunked backward against plain full logits: values, gradients, and what is
never materialised.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import (
    ROUNDING,
    RecordingHead,
    finished_rollout,
    rounded,
    same_maths,
    seeded,
    tiny_llada,
    train_batch,
)
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import elbo, mean_field
from unmaskrl.core.estimators.base import Estimator, weighted_sum
from unmaskrl.core.losses import LOSSES
from unmaskrl.core.scoring import (
    backward_in_chunks,
    behavior_gap,
    count_canvases,
    frozen_token_logps,
    live_token_logps,
    replay_views,
    target_logps,
    token_logps,
    view_logps,
)
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout, TrainBatch, Views
from unmaskrl.models.denoiser import ModelDenoiser

CHUNK = "unmaskrl.core.decoding.sample.CHUNK_ELEMENTS"


def rollout_of(denoiser: ModelDenoiser, exit_at: float | None = 0.6) -> Rollout:
    """Five rows: prompts of different lengths, anchors, exit tokens, and one row that is given as a
    whole.
    """
    canvas = anchored_canvas(
        [[1, 2, 3], [4], [5, 6], [7], [8, 9]],
        [{}, {0: 3, 4: 1}, {2: 2}, {i: i for i in range(6)}, {}],
        gen_length=6,
        denoiser=denoiser,
    )
    return decode(
        denoiser,
        canvas,
        block_length=3,
        steps=6,
        exit_at=exit_at,
        select="entropy",
        temperature=0.8,
        generator=seeded(7),
    )


def batch_for(rollout: Rollout, dtype: torch.dtype) -> TrainBatch:
    generator = seeded(12)
    mask = rollout.action_mask
    old = -torch.rand(mask.shape, generator=generator, dtype=dtype)
    ref = old + 0.3 * torch.randn(mask.shape, generator=generator, dtype=dtype)
    return train_batch(mask, torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0], dtype=dtype), old, ref)


def plain_token_logps(denoiser: ModelDenoiser, rollout: Rollout, views: Views) -> Tensor:
    """sum_m weight_m log p_m with all logits of all views at once."""
    total = torch.zeros(rollout.ids.shape, dtype=torch.float64)
    for m in range(views.ids.shape[1]):
        logits = denoiser.logits(views.ids[:, m], rollout.attention_mask)
        banned = torch.arange(logits.shape[-1]) == denoiser.mask_id
        logps = (logits / rollout.temperature).masked_fill(banned, float("-inf")).log_softmax(-1)
        picked = logps.gather(-1, rollout.ids[..., None]).squeeze(-1)
        weight = views.weight[:, m]
        total = total + torch.where(weight != 0, picked * weight, 0.0)
    return total


def gradients(denoiser: ModelDenoiser) -> list[Tensor]:
    grads = [p.grad.clone() for p in denoiser.model.parameters()]
    denoiser.model.zero_grad()
    return grads


def close(got: list[Tensor], want: list[Tensor], units: float = ROUNDING) -> bool:
    scale = max(float(w.abs().max()) for w in want)
    assert scale > 1e-3
    return all(same_maths(g, w, size=scale, units=units) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss_name", sorted(LOSSES))
@pytest.mark.parametrize("chunk_rows", [1, 4, 10**6])
def test_values_and_gradients_are_those_of_plain_full_logits(
    dtype, loss_name: str, chunk_rows: int, monkeypatch
) -> None:
    denoiser = tiny_llada(dtype)
    rollout = rollout_of(denoiser)
    estimator = elbo(num_mc=3)
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    loss = LOSSES[loss_name]()
    batch = batch_for(rollout, dtype)
    plain = plain_token_logps(denoiser, rollout, views)
    want_loss = loss(plain.to(dtype), batch).loss
    want_loss.backward()
    want = gradients(denoiser)
    monkeypatch.setattr(CHUNK, chunk_rows * denoiser.vocab_size)
    got = token_logps(denoiser, rollout, estimator, views)
    assert same_maths(got, plain.to(dtype))
    got_loss = loss(got, batch).loss
    got_loss.backward()
    assert got_loss.item() == rounded(want_loss.item(), dtype=dtype)
    assert close(gradients(denoiser), want)


@pytest.mark.parametrize("loss_name", sorted(LOSSES))
@pytest.mark.parametrize("max_canvases", [1, 2, 3])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_backward_in_chunks_is_the_plain_backward(
    loss_name: str, max_canvases: int, nonlinear: bool, monkeypatch
) -> None:
    """Also for a reduce that is not linear in the views, and with logits in chunks at the same
    time.
    """
    monkeypatch.setattr(CHUNK, 3 * 16)
    denoiser = tiny_llada()
    rollout = rollout_of(denoiser)
    base = elbo(num_mc=2)
    estimator = Estimator(base.make_views, squared_sum, base.num_views) if nonlinear else base
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    batch = batch_for(rollout, torch.float64)

    def loss(logps: Tensor):
        return LOSSES[loss_name]()(logps, batch)

    plain = loss(token_logps(denoiser, rollout, estimator, views))
    plain.loss.backward()
    want = gradients(denoiser)
    got = backward_in_chunks(denoiser, rollout, estimator, views, loss, max_canvases=max_canvases)
    # ratios are exp of weighted sums of some nats, of squared ones up to 16: rounding grows by that
    units = ROUNDING * (16 if nonlinear else 4)
    assert got.loss.item() == rounded(plain.loss.item(), units=units)
    assert not got.loss.requires_grad
    assert {k: v.item() for k, v in got.metrics.items()} == pytest.approx(
        {k: v.item() for k, v in plain.metrics.items()}
    )
    assert close(gradients(denoiser), want, units)


def squared_sum(logps: Tensor, views: Views) -> Tensor:
    return -(weighted_sum(logps, views) ** 2)


def distinct(rollout: Rollout, views: Views) -> int:
    """Different canvases among those that score anything."""
    attention = rollout.attention_mask[:, None].expand_as(views.ids)
    scoring = (views.weight != 0).any(-1)
    return len(
        {
            (tuple(i), tuple(a))
            for i, a in zip(views.ids[scoring].tolist(), attention[scoring].tolist(), strict=True)
        }
    )


def test_a_group_with_one_fully_masked_canvas_costs_one_row() -> None:
    denoiser = tiny_llada()
    ids = torch.randint(0, 9, (6, 5), generator=seeded(3)).tolist()
    rollout = finished_rollout(ids, [[1, 2, 3, 4, 5]] * 6, eos_id=denoiser.eos_id, prompt=8)
    rollout = replace(rollout, group_ids=torch.tensor([0, 0, 0, 1, 1, 1]))
    for p_mask_prompt, shared, canvases in ((0.0, False, 1), (0.5, True, 2), (0.5, False, 6)):
        estimator = mean_field(p_mask_prompt=p_mask_prompt, share_prompt_mask=shared)
        views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
        assert count_canvases(rollout, views) == canvases == distinct(rollout, views)
        got = token_logps(denoiser, rollout, estimator, views)
        assert torch.allclose(got, plain_token_logps(denoiser, rollout, views), atol=1e-9)


def test_backward_in_chunks_keeps_at_most_max_canvases_alive() -> None:
    denoiser = tiny_llada()
    rollout = rollout_of(denoiser)
    estimator = elbo(num_mc=2)
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    sizes = []
    hidden = denoiser.model.hidden
    denoiser.model.hidden = lambda ids, mask: sizes.append(len(ids)) or hidden(ids, mask)
    used = distinct(rollout, views)
    assert count_canvases(rollout, views) == used
    batch = batch_for(rollout, torch.float64)
    backward_in_chunks(
        denoiser,
        rollout,
        estimator,
        views,
        lambda x: LOSSES["token_clip"]()(x, batch),
        max_canvases=3,
    )
    assert max(sizes) <= 3
    assert sum(sizes) == 2 * used  # one pass without gradient, one with
    sizes.clear()
    backward_in_chunks(
        denoiser,
        rollout,
        estimator,
        views,
        lambda x: LOSSES["token_clip"]()(x, batch),
        max_canvases=99,
    )
    assert sizes == [used]


@pytest.mark.parametrize("max_canvases", [1, 3])
def test_health_checks_keep_at_most_max_canvases_alive(max_canvases: int) -> None:
    """The check of the first ratio runs with gradient, the replay of the rollout without: neither
    runs all canvases at once.
    """
    denoiser = tiny_llada()
    rollout = rollout_of(denoiser)
    estimator = elbo(num_mc=2)
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    want = token_logps(denoiser, rollout, estimator, views)
    gap = behavior_gap(denoiser, rollout)
    calls = []
    hidden = denoiser.model.hidden
    denoiser.model.hidden = lambda ids, mask: (
        calls.append((len(ids), torch.is_grad_enabled())) or hidden(ids, mask)
    )
    live = live_token_logps(denoiser, rollout, estimator, views, max_canvases=max_canvases)
    assert torch.allclose(live, want.detach(), atol=1e-12) and not live.requires_grad
    assert all(graph and rows <= max_canvases for rows, graph in calls) and len(calls) > 1
    calls.clear()
    assert behavior_gap(denoiser, rollout, max_canvases=max_canvases) == pytest.approx(
        gap, abs=1e-12
    )
    assert not any(graph or rows > max_canvases for rows, graph in calls) and len(calls) > 1


@pytest.mark.parametrize("max_canvases", [1, 4, 99])
def test_frozen_token_logps_are_token_logps_without_gradient(max_canvases: int) -> None:
    denoiser = tiny_llada()
    rollout = rollout_of(denoiser)
    estimator = elbo(num_mc=3)
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    frozen = frozen_token_logps(denoiser, rollout, estimator, views, max_canvases=max_canvases)
    assert not frozen.requires_grad
    assert torch.allclose(
        frozen, token_logps(denoiser, rollout, estimator, views).detach(), atol=1e-12
    )


@pytest.mark.parametrize("max_canvases", [1, 4, 99])
def test_the_first_update_has_ratio_exactly_1_in_fp32(max_canvases: int) -> None:
    """Old log-probs without gradient and new ones with it must agree to the last bit, chunk by
    chunk.
    """
    denoiser = tiny_llada(torch.float32)
    rollout = rollout_of(denoiser)
    estimator = elbo(num_mc=3)
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    old = frozen_token_logps(denoiser, rollout, estimator, views, max_canvases=max_canvases)
    batch = replace(batch_for(rollout, torch.float32), old_logps=old, ref_logps=old)
    out = backward_in_chunks(
        denoiser,
        rollout,
        estimator,
        views,
        lambda x: LOSSES["token_clip"]()(x, batch),
        max_canvases=max_canvases,
    )
    assert out.metrics["ratio/max_dev"] == 0
    assert out.metrics["kl/ref"] == 0


def test_no_tensor_of_all_logits_in_scoring_or_decoding(monkeypatch) -> None:
    denoiser = tiny_llada()
    monkeypatch.setattr(CHUNK, 4 * denoiser.vocab_size)
    recorder = RecordingHead(denoiser)
    for select, exit_at in itertools.product(("confidence", "entropy", "random"), (None, 0.5)):
        canvas = anchored_canvas([[1, 2]] * 6, [{1: 2}] * 6, gen_length=6, denoiser=denoiser)
        options = {"select": select, "temperature": 1.0, "exit_at": exit_at, "generator": seeded(1)}
        rollout = decode(recorder, canvas, block_length=6, steps=3, **options)
        assert recorder.calls > 3
        assert 0 < recorder.largest <= 4 * denoiser.vocab_size
    for estimator in (elbo(num_mc=3), mean_field()):
        views = estimator.make_views(rollout, denoiser.mask_id, seeded(2))
        recorder.largest = recorder.calls = 0
        token_logps(recorder, rollout, estimator, views).sum().backward()
        scored = int((views.weight != 0).sum())
        assert recorder.calls >= 2 * (scored // 4)  # forward, and again in the backward pass
        assert 0 < recorder.largest <= 4 * denoiser.vocab_size


def test_logits_are_computed_at_scored_positions_only() -> None:
    denoiser = tiny_llada()
    recorder = RecordingHead(denoiser)
    rollout = rollout_of(denoiser)
    views = elbo(num_mc=1).make_views(rollout, denoiser.mask_id, seeded(2))
    view_logps(recorder, rollout, views)
    assert recorder.calls == 1
    assert recorder.largest == int((views.weight != 0).sum()) * denoiser.vocab_size


def test_unscored_positions_get_exactly_zero_and_unscored_views_cost_nothing() -> None:
    denoiser = tiny_llada()
    rollout = rollout_of(denoiser)
    views = elbo(num_mc=2).make_views(rollout, denoiser.mask_id, seeded(2))
    logps = view_logps(denoiser, rollout, views)
    assert torch.equal(logps != 0, views.weight != 0)
    rows = []
    hidden = denoiser.model.hidden
    denoiser.model.hidden = lambda ids, mask: rows.append(len(ids)) or hidden(ids, mask)
    view_logps(denoiser, rollout, views)
    assert rows == [distinct(rollout, views)]
    # the given row, and exit views of rows without exit
    assert rows[0] < views.ids.shape[0] * views.ids.shape[1]


def test_a_batch_in_which_nothing_is_scored() -> None:
    denoiser = tiny_llada()
    rollout = finished_rollout([[1, 2], [3, 4]], [[0, 0], [0, 0]], eos_id=denoiser.eos_id)
    for estimator in (elbo(), mean_field()):
        views = estimator.make_views(rollout, denoiser.mask_id, seeded())
        assert (views.weight == 0).all()
        assert (token_logps(denoiser, rollout, estimator, views) == 0).all()
        frozen = frozen_token_logps(denoiser, rollout, estimator, views, max_canvases=2)
        assert (frozen == 0).all()


def test_scores_are_at_the_temperature_of_the_rollout() -> None:
    denoiser = tiny_llada()
    hidden = torch.randn(5, 16, generator=seeded(3), dtype=torch.float64)
    targets = torch.tensor([0, 3, 5, 12, 10])
    for temperature in (0.0, 0.5, 1.0, 2.0):
        logits = denoiser.head(hidden) / (temperature or 1.0)
        keep = [v for v in range(denoiser.vocab_size) if v != denoiser.mask_id]
        want = logits[range(5), targets] - logits[:, keep].logsumexp(-1)
        assert torch.allclose(
            target_logps(denoiser, hidden, targets, temperature), want, atol=1e-12
        )


def test_scoring_overwrites_nothing_of_its_caller() -> None:
    """A head may return its input (the toy's does): scores and gradients must not be computed in
    that memory.
    """
    generator = seeded(4)
    toy = ToyDenoiser.random(generator, num_tokens=3, length=2)
    hidden = torch.randn(
        6, toy.vocab_size, generator=generator, dtype=torch.float64, requires_grad=True
    )
    before = hidden.detach().clone()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    for temperature in (1.0, 0.7):
        first = target_logps(toy, hidden, targets, temperature)
        first.sum().backward()
        gradient = hidden.grad.clone()
        hidden.grad = None
        assert torch.equal(hidden.detach(), before)
        target_logps(toy, hidden, targets, temperature).sum().backward()
        assert torch.equal(hidden.grad, gradient)
        keep = [0, 1, 2, 4]  # without the mask token
        logits = hidden / temperature
        plain = logits[range(6), targets] - logits[:, keep].logsumexp(-1)
        assert torch.allclose(first, plain, atol=1e-12)
        (want,) = torch.autograd.grad(plain.sum(), hidden)
        assert torch.allclose(gradient, want, atol=1e-12)
        hidden.grad = None


def test_a_second_backward_through_the_same_scores_is_right_or_refused() -> None:
    toy = ToyDenoiser.random(seeded(4), num_tokens=3, length=2)
    hidden = torch.randn(
        4, toy.vocab_size, generator=seeded(5), dtype=torch.float64, requires_grad=True
    )
    total = target_logps(toy, hidden, torch.tensor([0, 1, 2, 0]), 1.0).sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    try:
        (second,) = torch.autograd.grad(total, hidden)
    except RuntimeError:
        return
    assert torch.equal(first, second)


def test_bf16_models_are_scored_in_fp32() -> None:
    denoiser = tiny_llada(torch.bfloat16)
    hidden = torch.randn(3, 16, generator=seeded(3)).bfloat16()
    assert target_logps(denoiser, hidden, torch.tensor([0, 1, 2]), 1.0).dtype == torch.float32


@pytest.mark.parametrize("exit_at", [None, 0.6])
def test_replay_views_give_back_the_behavior_logps(exit_at: float | None) -> None:
    denoiser = tiny_llada()
    rollout = rollout_of(denoiser, exit_at)
    views = replay_views(rollout, denoiser.mask_id)
    scored = (views.weight > 0).sum(1)
    drawn = (rollout.decoded_step > 0) & (rollout.decoded_step <= rollout.nfe[:, None])
    assert torch.equal(scored, drawn.long())
    assert (
        view_logps(denoiser, rollout, views).sum(1) - rollout.behavior_logps
    ).abs().max() < 1e-10
    assert behavior_gap(denoiser, rollout) < 1e-10
    other = tiny_llada(seed=4)
    assert behavior_gap(other, rollout) > 0.1


def test_behavior_gap_of_a_batch_in_which_nothing_was_drawn_is_zero() -> None:
    denoiser = tiny_llada()
    assert (
        behavior_gap(denoiser, finished_rollout([[1, 2]], [[0, 0]], eos_id=denoiser.eos_id)) == 0.0
    )
