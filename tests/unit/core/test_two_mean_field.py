"""DiFFPO's likelihood and its correction on the exact toy: limits, enumeration, truncated
weights.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor

from tests.conftest import finished_rollout, seeded, tiny_llada, train_batch
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import mean_field, trajectory, two_mean_field
from unmaskrl.core.importance import (
    NUM_QUARTILES,
    progress_of,
    summarise,
    truncated_weights,
    weight_sums,
)
from unmaskrl.core.losses import token_clip
from unmaskrl.core.scoring import count_canvases, token_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout


def decoded(rows: int = 12, select: str = "eb", gamma: float | None = 0.8) -> tuple:
    denoiser = tiny_llada()
    canvas = anchored_canvas(
        [[1, 2], [5], [6]] * (rows // 3),
        [{}, {0: 2}, {}] * (rows // 3),
        gen_length=6,
        denoiser=denoiser,
    )
    options = {"block_length": 6, "steps": 6, "select": select, "gamma": gamma, "temperature": 1.0}
    return denoiser, decode(denoiser, canvas, generator=seeded(2), **options)


def times_of(rollout: Rollout, views, mask_id: int) -> list[int]:
    """tau of each row: how many calls the second view shows."""
    shown = (views.ids[:, 1] != mask_id) & (rollout.decoded_step > 0)
    return (rollout.decoded_step * shown).amax(-1).tolist()


def test_times_are_uniform_on_0_to_T_minus_1_and_redrawn() -> None:
    rollout = finished_rollout([[1, 2, 0, 1, 2]] * 3000, [[3, 1, 4, 2, 5]] * 3000, eos_id=9)
    first = two_mean_field().make_views(rollout, 8, seeded(1))
    counts = torch.tensor(times_of(rollout, first, 8)).bincount(minlength=5)
    assert (counts - 600).abs().max() < 4 * (3000 * 0.2 * 0.8) ** 0.5 and len(counts) == 5
    assert not torch.equal(first.ids, two_mean_field().make_views(rollout, 8, seeded(2)).ids)


def test_each_token_is_scored_once_from_the_latent_the_rule_names() -> None:
    denoiser, rollout = decoded()
    views = two_mean_field().make_views(rollout, denoiser.mask_id, seeded(3))
    assert torch.equal(views.weight.sum(1) == 1, rollout.action_mask)
    for row, tau in enumerate(times_of(rollout, views, denoiser.mask_id)):
        late = rollout.action_mask[row] & (rollout.decoded_step[row] > tau)
        assert torch.equal(views.weight[row, 1] == 1, late)
        assert torch.equal(
            views.ids[row, 1],
            rollout.latent(torch.full_like(rollout.nfe, tau), denoiser.mask_id)[row],
        )
        assert torch.equal(
            views.ids[row, 0], rollout.latent(torch.zeros_like(rollout.nfe), denoiser.mask_id)[row]
        )


def test_tau_0_is_the_mean_field_and_two_calls_at_tau_1_are_exact() -> None:
    denoiser, rollout = decoded()
    views = two_mean_field().make_views(rollout, denoiser.mask_id, seeded(3))
    ours = token_logps(denoiser, rollout, two_mean_field(), views)
    plain = mean_field(p_mask_prompt=0.0)
    mf = token_logps(
        denoiser, rollout, plain, plain.make_views(rollout, denoiser.mask_id, seeded())
    )
    taus = torch.tensor(times_of(rollout, views, denoiser.mask_id))
    # the mean field hides what lies behind the first EOS; so does z_0
    ended = rollout.completion_mask.sum(-1) < 6
    assert (taus == 0).any() and (taus > 0).any() and not ended.all()
    assert torch.allclose(ours[taus == 0], mf[taus == 0], atol=1e-9)
    exact = (rollout.decoded_step == 1) | (rollout.decoded_step == taus[:, None] + 1)
    gap = (ours - rollout.behavior_logps).abs() * rollout.action_mask
    assert (gap * exact).max() < 1e-5 and gap.max() > 1e-2
    two = rollout.nfe == 2
    assert two.any()
    full = two & (taus == 1)
    if full.any():
        assert gap[full].max() < 1e-5


def test_as_many_times_as_calls_are_the_replay() -> None:
    denoiser, rollout = decoded()
    most = int(rollout.nfe.max())
    many = two_mean_field(num_times=most)
    views = many.make_views(rollout, denoiser.mask_id, seeded(1))
    assert views.ids.shape[1] == many.num_views(6, most, False) == most + 1
    replay = trajectory().make_views(rollout, denoiser.mask_id, seeded())
    want = token_logps(denoiser, rollout, trajectory(), replay)
    assert torch.allclose(token_logps(denoiser, rollout, many, views), want, atol=1e-9)


def test_a_group_shares_its_fully_masked_canvas() -> None:
    denoiser = tiny_llada()
    canvas = blank_canvas([[1, 2]] * 6, gen_length=5, denoiser=denoiser)
    rollout = decode(
        denoiser,
        canvas,
        block_length=5,
        steps=5,
        select="entropy",
        temperature=2.0,
        generator=seeded(3),
    )
    views = two_mean_field().make_views(rollout, denoiser.mask_id, seeded(4))
    latents = {tuple(row) for row in views.ids[:, 1].tolist()} | {tuple(views.ids[0, 0].tolist())}
    assert count_canvases(rollout, views) <= len(latents) < 12


def kl_by_tau(toy: ToyDenoiser, steps: list[int]) -> list[float]:
    """E_y sum_i [log p(y_i | z_{t-1}) - log p(y_i | z_s)] for tau = 0..T-1, over the policy's own
    y, enumerated.

    ``steps``: the call that reveals each position.
    """
    rollout = finished_rollout(
        toy.completions.tolist(), [steps] * len(toy.completions), eos_id=toy.eos_id
    )
    exact = token_logps(
        toy, rollout, trajectory(), trajectory().make_views(rollout, toy.mask_id, seeded())
    ).sum(-1)
    probs = exact.exp()
    result = []
    for tau in range(max(steps)):
        # replaying this trajectory scores from z_0 and z_tau
        merged = [1 if s <= tau else tau + 1 for s in steps]
        two = finished_rollout(
            toy.completions.tolist(), [merged] * len(toy.completions), eos_id=toy.eos_id
        )
        views = trajectory().make_views(two, toy.mask_id, seeded())
        result.append(
            float((probs * (exact - token_logps(toy, two, trajectory(), views).sum(-1))).sum())
        )
    return result


def test_with_one_token_per_call_no_tau_is_further_from_the_policy_than_the_mean_field() -> None:
    """Mean KL over random joints (that it falls is a claim of DiFFPO, arXiv 2510.02212): tau = 0
    is the mean field, and no tau > 0 is worse on a joint.
    """
    steps = [2, 4, 1, 5, 3]
    table = torch.tensor(
        [kl_by_tau(ToyDenoiser.random(seeded(s), num_tokens=3, length=5), steps) for s in range(8)]
    )
    assert (table[:, 1:] <= table[:, :1] + 1e-9).all()
    mean = table.mean(0)
    assert float(mean.mean()) < 0.8 * float(mean[0])  # over 20 joints: .603 against .907
    assert (mean[1:] < mean[0]).all()


def test_with_several_tokens_per_call_a_tau_can_be_further_and_their_average_was_not() -> None:
    """Exact joints of 4 tokens, calls {0}, {1, 2}, {3}: the policy is then no joint itself. An
    observation for the average.
    """
    weights = [2 * torch.randn(16, generator=seeded(s), dtype=torch.float64) for s in range(30)]
    toys = [ToyDenoiser(w, num_tokens=2, length=4) for w in weights]
    table = torch.tensor([kl_by_tau(toy, [1, 2, 2, 3]) for toy in toys])
    worse = table[:, 1:] > table[:, :1] + 1e-9
    assert 0 < int(worse.sum()) < 0.1 * worse.numel()
    assert float((table[:, 1:] - table[:, :1]).max()) > 0.01
    assert (table.mean(1) <= table[:, 0] + 1e-9).all()


def test_weights_are_1_where_the_surrogate_is_exact_and_average_to_1() -> None:
    """E over the behavior of the untruncated weight is 1 at every token: enumerate completions of a
    fixed order.
    """
    toy = ToyDenoiser.random(seeded(5), num_tokens=3, length=4)
    steps = [2, 4, 1, 3]
    rollout = finished_rollout(toy.completions.tolist(), [steps] * 81, eos_id=toy.eos_id)
    exact = token_logps(
        toy, rollout, trajectory(), trajectory().make_views(rollout, toy.mask_id, seeded())
    )
    merged = finished_rollout(
        toy.completions.tolist(), [[1 if s <= 2 else 3 for s in steps]] * 81, eos_id=toy.eos_id
    )
    surrogate = token_logps(
        toy, merged, trajectory(), trajectory().make_views(merged, toy.mask_id, seeded())
    )
    weights = truncated_weights(surrogate, exact, rollout.action_mask, cap=1e9)
    probs = toy.log_joint().exp()
    assert torch.allclose(
        (probs[:, None] * weights)[:, -4:].sum(0), torch.ones(4, dtype=torch.float64), atol=1e-9
    )
    assert torch.allclose(
        weights[:, -4:][:, [2, 3]], torch.ones(81, 2, dtype=torch.float64), atol=1e-9
    )  # steps 1 and 3
    assert (weights[:, -4:][:, [0, 1]] - 1).abs().max() > 0.1
    capped = truncated_weights(surrogate, exact, rollout.action_mask, cap=1.2)
    assert torch.equal(capped, weights.clamp(max=1.2 + 1e-15)) or torch.allclose(
        capped, weights.clamp(max=1.2), atol=1e-12
    )
    assert ((probs[:, None] * capped)[:, -4:].sum(0) <= 1 + 1e-12).all()


def test_the_untruncated_gradient_is_the_policy_gradient_of_the_surrogate_by_enumeration() -> None:
    """At theta = old: sum_x p(x) w(x) A(x) grad l_i, per token; against a direct sum over the
    surrogate's conditionals.
    """
    toy = ToyDenoiser.random(seeded(6), num_tokens=2, length=3)
    weights = toy.log_weights.clone().requires_grad_()
    live = ToyDenoiser(weights, num_tokens=2, length=3)
    steps = [[1, 2, 3]] * 8
    rollout = finished_rollout(toy.completions.tolist(), steps, eos_id=toy.eos_id)
    behavior = token_logps(
        toy, rollout, trajectory(), trajectory().make_views(rollout, toy.mask_id, seeded())
    )
    plain = mean_field(p_mask_prompt=0.0)
    views = plain.make_views(rollout, toy.mask_id, seeded())
    logps = token_logps(live, rollout, plain, views)
    probs = toy.log_joint().exp()
    advantages = torch.randn(8, generator=seeded(7), dtype=torch.float64)
    batch = train_batch(
        rollout.action_mask,
        probs * advantages,
        logps.detach(),
        num_actions=1.0,
        behavior_logps=behavior,
    )
    (got,) = torch.autograd.grad(token_clip(kl_coef=0.0, is_cap=1e9)(logps, batch).loss, weights)
    logps = token_logps(live, rollout, plain, views)
    total = torch.zeros((), dtype=torch.float64)
    for row, ids in enumerate(toy.completions.tolist()):
        for c in range(3):
            w = exp(float(logps[row, -3 + c].detach() - behavior[row, -3 + c].detach()))
            total = total - float(probs[row]) * float(advantages[row]) * w * logps[row, -3 + c]
        assert len(ids) == 3
    (want,) = torch.autograd.grad(total, weights)
    assert want.abs().max() > 1e-3 and torch.allclose(got, want, atol=1e-9)


def test_weights_multiply_the_clipped_gain_and_are_constants() -> None:
    mask = torch.tensor([[True, True]])
    logps = torch.tensor([[log(1.5), 0.0]], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([[log(4.0), -log(8.0)]], dtype=torch.float64)
    batch = train_batch(
        mask, torch.tensor([1.0], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    )
    batch = replace(batch, behavior_logps=behavior)
    out = token_clip(kl_coef=0.0, is_cap=2.0)(logps, batch)
    # 1/4, and 8 truncated to 2
    assert out.loss.item() == pytest.approx(-(0.25 * 1.2 + 2.0 * 1.0) / 2)
    out.loss.backward()
    assert logps.grad.tolist() == [pytest.approx([0.0, -1.0])]  # the first is clipped
    own = token_clip(kl_coef=0.0, is_cap=2.0, is_normalise=True)(logps.detach(), batch)
    assert own.loss.item() == pytest.approx(-(0.25 * 1.2 + 2.0) / 1.125 / 2)


def test_weight_metrics_add_up_and_fall_into_quartiles() -> None:
    generator = seeded(8)
    mask = torch.rand(6, 9, generator=generator) < 0.8
    weights = torch.rand(6, 9, generator=generator, dtype=torch.float64).clamp(max=0.9) * mask
    steps = torch.randint(1, 9, (6, 9), generator=generator)
    progress = progress_of(steps, torch.full((6,), 8))
    whole = weight_sums(weights, mask, progress, 0.9, float(mask.sum()))
    halves = [
        weight_sums(weights[r], mask[r], progress[r], 0.9, float(mask.sum()))
        for r in (slice(0, 2), slice(2, 6))
    ]
    assert all(float(whole[k]) == pytest.approx(sum(float(h[k]) for h in halves)) for k in whole)
    got = summarise({k: float(v) for k, v in whole.items()})
    values = weights[mask]
    assert got["is/mean"] == pytest.approx(float(values.mean()))
    assert got["is/truncated"] == pytest.approx(float((values >= 0.9).double().mean()))
    assert got["is/ess"] == pytest.approx(
        float(values.sum() ** 2 / (values**2).sum() / len(values))
    )
    for q in range(1, NUM_QUARTILES + 1):
        inside = mask & (steps > 2 * (q - 1)) & (steps <= 2 * q)
        assert got[f"is/mean_q{q}"] == pytest.approx(float(weights[inside].mean()))
    assert summarise({"loss": 1.0}) == {"loss": 1.0}


def test_bad_estimator_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_times"):
        two_mean_field(num_times=0)


@pytest.mark.parametrize("kwargs", [{"is_cap": 0.5}, {"is_normalise": True}])
def test_bad_caps_are_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="is_cap"):
        token_clip(**kwargs)


def test_orders_of_the_toy_cover_every_token_once() -> None:
    for order in itertools.islice(itertools.permutations(range(3)), 3):
        values: Tensor = torch.tensor(
            kl_by_tau(ToyDenoiser.random(seeded(1), num_tokens=2, length=3), [s + 1 for s in order])
        )
        assert (values >= -1e-12).all() and values[0] >= values.min()
