"""Estimators and losses against the formulas of the published code, written out again here
(docs/papers.md cites the files).
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from tests.conftest import finished_rollout, seeded, tiny_llada, train_batch
from unmaskrl.core.advantages import leave_one_out, softmax_weights
from unmaskrl.core.estimators import Update, coupled, espo, gauss, sandwich, trajectory, unigrpo
from unmaskrl.core.losses import linear_bound, reinforce, sequence_clip
from unmaskrl.core.scoring import view_logps
from unmaskrl.core.types import Rollout, Views

DENOISER = tiny_llada()
MASK = DENOISER.mask_id
EOS = DENOISER.eos_id


def rollout(rows: int = 4, length: int = 12, eos: bool = True, prompt: int = 30) -> Rollout:
    """Random completions decoded left to right, one token a call; odd rows end with EOS two thirds
    in.
    """
    ids = torch.randint(0, 11, (rows, length), generator=seeded(3))
    if eos:
        ids[1::2, 2 * length // 3] = EOS
    steps = [list(range(1, length + 1))] * rows
    return finished_rollout(
        ids.tolist(), steps, eos_id=EOS, prompt=prompt, row_ids=list(range(rows))
    )


def scored(done: Rollout, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    """View log-probs, which tokens count in which view, and f: completion tokens of each row."""
    return (
        view_logps(DENOISER, done, views).detach(),
        views.weight != 0,
        done.action_mask.sum(-1).double(),
    )


@pytest.mark.parametrize("mask", ["block", "random"])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_spg_objective_is_that_of_its_code(mask: str, mix: float) -> None:
    """Per row: mean over draws of the mean over hidden tokens; EUBO over tokens hidden at least
    once; weighted by length.
    """
    done = rollout(rows=6)
    beta = 1.5
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0, 0.0, 1.5], dtype=torch.float64)
    bounds = sandwich(num_mc=3, mix=mix, beta=beta, mask=mask, block_length=4)
    views = bounds.make_views(done, MASK, seeded(1), Update(advantages=advantages))
    logps, hidden, f = scored(done, views)
    count = hidden.sum(-1).double()
    lower = ((logps * hidden).sum(-1) / count).mean(1)
    rate = count / f[:, None]
    average = ((logps * beta).exp() * hidden / rate[..., None]).mean(1)
    once = hidden.any(1)
    upper = (torch.where(once, average, 1.0).log() * once).sum(-1) / once.sum(-1) / beta
    value = torch.where(advantages > 0, lower, mix * upper + (1 - mix) * lower)
    want = -(advantages * value * f).sum() / f.sum()
    got = reinforce()(
        bounds.reduce(logps, views),
        train_batch(done.action_mask, advantages, torch.zeros_like(logps[:, 0])),
    )
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-6)


def test_spg_blocks_hide_what_its_code_hides() -> None:
    """A part of one block, all that follows, the tail behind EOS; before it noise at rate 0.15,
    drawn anew for each view.
    """
    done = rollout(rows=300)
    block = 4
    noisy = (
        sandwich(num_mc=2, block_length=block).make_views(done, MASK, seeded(2)).ids[..., :30]
        == MASK
    )
    for share, rate in ((noisy, 0.15), (noisy[:, 0] & noisy[:, 1], 0.15**2)):
        assert abs(float(share.double().mean()) - rate) < 4 * math.sqrt(
            rate * (1 - rate) / share.numel()
        )
    clean = sandwich(num_mc=2, block_length=block, p_mask_context=0.0).make_views(
        done, MASK, seeded(2)
    )
    hidden = clean.ids[..., 30:] == MASK
    chosen = hidden.long().argmax(-1) // block  # the block of the first hidden token
    place = torch.arange(12)
    assert bool((hidden | (place < (chosen[..., None] + 1) * block)).all())
    assert bool((hidden | done.completion_mask[:, None, 30:]).all())
    assert (chosen[:, 0] != chosen[:, 1]).all() and chosen.unique().tolist() == [0, 1, 2]
    partly = hidden.gather(-1, chosen[..., None] * block + torch.arange(block)).sum(-1)[::2]
    assert partly.unique().tolist() == [1, 2, 3, 4]


def test_espo_estimate_is_that_of_its_code() -> None:
    """x of L hidden: (L + 1) / x on them, and on the rest from the complement (L + 1) / (L - x),
    halved; draws averaged.
    """
    done = rollout(eos=False)
    estimator = espo(num_mc=2)
    views = estimator.make_views(done, MASK, seeded(4))
    logps, hidden, f = scored(done, views)
    assert views.ids.shape[1] == 4
    total = torch.zeros(4, dtype=torch.float64)
    for first, second in ((0, 1), (2, 3)):
        x = (views.ids[:, first, 30:] == MASK).sum(-1)
        assert ((views.ids[:, first] == MASK) ^ (views.ids[:, second] == MASK))[:, 30:].all()
        for part, count in ((first, x), (second, 12 - x)):
            total += (
                torch.where(count > 0, (13 / count.clamp(min=1)) * logps[:, part].sum(-1), 0.0) / 4
            )
    assert hidden.any(1)[:, 30:].all() and (f == 12).all()
    assert torch.allclose(estimator.reduce(logps, views).sum(-1), total, rtol=1e-6)


def test_espo_loss_is_that_of_its_code() -> None:
    """-mean_rows min(w A, clip(w) A), w = exp((L_new - L_old) / f), + beta * mean_rows (L_new -
    L_ref)^2 / (2 f).
    """
    done = rollout(rows=4)
    mask = done.action_mask
    f = done.action_mask.sum(-1).double()
    new, old, ref = (
        torch.randn(mask.shape, generator=seeded(s), dtype=torch.float64) * mask for s in (1, 2, 3)
    )
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    advantages = leave_one_out(rewards, torch.zeros(4, dtype=torch.int64))
    assert advantages.tolist() == pytest.approx([0.0, -4 / 3, -4 / 3, 8 / 3])
    ratio = ((new - old).sum(-1) / f).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    kl = ((new - ref).sum(-1) ** 2 / 2 / f).mean()
    loss = sequence_clip(kl_coef=0.01, kl="quadratic")(new, train_batch(mask, advantages, old, ref))
    assert loss.loss.item() == pytest.approx((0.01 * kl - gain).item(), rel=1e-9)


def test_wd1_loss_is_that_of_its_code() -> None:
    """Per group: -sum_i softmax(A)_i l_i + sum_i softmax(-A)_i l_i over whole rows; the mean over
    groups.
    """
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, -1.0], dtype=torch.float64)
    done = rollout(rows=6)
    logps = torch.randn(done.ids.shape, generator=seeded(5), dtype=torch.float64)
    want = torch.zeros((), dtype=torch.float64)
    for group in (0, 1):
        own = groups == group
        advantages = rewards[own] - rewards[own].mean()
        whole = (logps * done.action_mask)[own].sum(-1)
        want += (
            -(advantages.softmax(0) * whole).sum() + ((-advantages).softmax(0) * whole).sum()
        ) / 2
    batch = train_batch(
        done.action_mask, softmax_weights(rewards, groups), torch.zeros_like(logps), num_groups=2.0
    )
    assert reinforce(normaliser="groups")(logps, batch).loss.item() == pytest.approx(
        want.item(), rel=1e-9
    )


@pytest.mark.parametrize("length", [20, 33, 5])
def test_gdpo_counts_and_weights_are_those_of_its_code(length: int) -> None:
    """floor(t f), at least 1, tokens at the nodes of the 3-point rule, each weighted w / t."""
    done = rollout(rows=3, length=length, eos=False)
    views = gauss(num_nodes=3).make_views(done, MASK, seeded(6))
    root = math.sqrt(3 / 5)
    for k, (node, weight) in enumerate(((-root, 5 / 9), (0.0, 8 / 9), (root, 5 / 9))):
        t = (node + 1) / 2
        w = weight / 2
        assert ((views.ids[:, k, 30:] == MASK).sum(-1) == max(1, math.floor(t * length))).all()
        assert torch.allclose(views.weight[:, k].amax(-1), torch.tensor(w / t), atol=1e-6)


def test_coupled_masks_and_weights_are_those_of_its_code() -> None:
    """All hidden; a random part; its complement; 1/2 (1, 1 / rho, 1 / (1 - rho)) with rho in (0.2,
    0.8); the prompt stays.
    """
    done = rollout(rows=200, eos=False)
    views = coupled().make_views(done, MASK, seeded(7))
    hidden = (views.ids == MASK)[..., 30:]
    assert (
        hidden[:, 0].all()
        and (hidden[:, 1] ^ hidden[:, 2]).all()
        and not (views.ids == MASK)[..., :30].any()
    )
    part = views.weight[:, 1].amax(-1)
    rest = views.weight[:, 2].amax(-1)
    both = (part > 0) & (rest > 0)
    assert both.sum() > 150 and torch.allclose(
        (1 / part + 1 / rest)[both] / 2, torch.ones(int(both.sum())), atol=1e-5
    )
    rho = 1 / part[both] / 2
    assert (
        float(rho.min()) > 0.2 and float(rho.max()) < 0.8 and (views.weight[:, 0, 30:] == 0.5).all()
    )


def test_unigrpo_rates_climb_as_in_its_algorithm() -> None:
    """t_n = floor((n - 1) / (mu - 1) * (T - t_1) + t_1) of T = 1000, t_1 = ceil(1000 u): evenly
    spread, all hidden at last.
    """
    done = rollout(rows=60, length=300, eos=False)
    seed = 11
    u = importlib.import_module("unmaskrl.core.estimators.unigrpo").row_uniform(done, seed)
    first = (u * 1000).ceil()
    for n in range(5):
        rate = (n / 4 * (1000 - first) + first).floor() / 1000
        views = unigrpo(num_steps=1000).make_views(
            done, MASK, seeded(n), Update(index=n, total=5, seed=seed)
        )
        share = (views.ids[:, 0, 30:] == MASK).double().mean(-1)
        spread = (rate * (1 - rate) / 300).sqrt()
        assert ((share - rate).abs() <= 5 * spread).all()
    assert (share == 1).all()


@pytest.mark.parametrize(("calls", "segments"), [(10, 3), (12, 4), (7, 7), (8, 3)])
def test_d2_segments_start_where_its_code_keeps_the_canvas(calls: int, segments: int) -> None:
    """The canvas after floor(u T / N) calls, scored where the calls up to floor((u + 1) T / N)
    revealed tokens.
    """
    done = rollout(rows=2, length=calls, eos=False)
    views = trajectory(num_segments=segments).make_views(done, MASK, seeded(8))
    starts = [int(u * (calls / segments)) for u in range(segments)] + [calls]
    for u in range(segments):
        open_tokens = (views.ids[:, u, 30:] == MASK).sum(-1)
        assert (open_tokens == calls - starts[u]).all()
        assert ((views.weight[:, u] > 0).sum(-1) == starts[u + 1] - starts[u]).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_bgpo_is_its_per_draw_objective_at_the_old_policy(advantage: float) -> None:
    """Mean over draws of w_j A, w_j = 1 + d_j or exp(d_j): same value and gradient as ours at d =
    0, where BGPO trains.
    """
    draws = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    per_draw = draws.mean(-1)
    ratio = 1 + per_draw if advantage > 0 else per_draw.exp()
    published = -(ratio * advantage).mean()
    (want,) = torch.autograd.grad(published, draws)
    mask = torch.ones(1, 4, dtype=torch.bool)
    batch = train_batch(
        mask, torch.tensor([advantage], dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    )
    ours = linear_bound()(draws.mean(0, keepdim=True), batch).loss
    (got,) = torch.autograd.grad(ours, draws)
    assert ours.item() == pytest.approx(published.item()) and torch.allclose(got, want)
