"""The threshold head: starts as the prior, exact policy gradient, learns a planted task (and its
control does not), files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.block_rows import decoded, toy
from tests.conftest import chi_square_p, finished_rollout, same_maths, seeded, tiny_llada
from unmaskrl.core.advantages import group_mean
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.threshold_head import (
    GAMMAS,
    ThresholdHead,
    best_gamma,
    check_grid,
    prompt_features,
    speed_reward,
    threshold_loss,
)
from unmaskrl.models.heads import load_threshold, save_threshold
from unmaskrl.recipes.schema import SamplerConfig
from unmaskrl.training.rollouts.problems import Rewarded
from unmaskrl.training.rollouts.threshold_policy import (
    Choices,
    Sampler,
    num_blocks,
    sampler_metrics,
)

GRID = (0.0, 0.1, 1.0)


def new_head(gammas=GRID, **options) -> ThresholdHead:
    return ThresholdHead(16, gammas, width=8, **options).init_weights(seeded(1))


def features(rows: int, seed: int = 2) -> Tensor:
    return torch.randn(rows, 16, generator=seeded(seed))


def test_it_starts_as_a_peak_at_start_with_a_floor_whatever_the_prompt() -> None:
    head = ThresholdHead(16, start=0.1).init_weights(seeded(3))
    probs = head.log_probs(features(50)).detach().exp()
    assert torch.allclose(probs.sum(-1), torch.ones(50)) and (probs >= 0.02 - 1e-6).all()
    assert same_maths(probs, probs[:1].expand_as(probs))
    assert float(head.gammas(probs.argmax(-1))[0]) == 0.1
    ratio = (probs[0] - 0.02) / (1 - 9 * 0.02)
    assert float((ratio[5] / ratio[4]).log()) == pytest.approx(2.0, abs=1e-4)


def test_a_head_without_drawn_weights_is_the_peak_too() -> None:
    """Nothing is left as memory happened to be: every parameter is set by the constructor."""
    # freed memory that a new head may get
    junk = [torch.full((1 << k,), float("nan")) for k in range(4, 14)]
    del junk
    for _ in range(20):
        head = ThresholdHead(5, GAMMAS, start=0.1)
        assert all(bool(torch.isfinite(p).all()) for p in head.parameters())
        assert not head.inner.weight.any() and not head.inner.bias.any()
        probs = head.log_probs(torch.randn(4, 5, generator=seeded(1))).exp()
        assert (
            torch.allclose(probs.sum(-1), torch.ones(4))
            and float(head.gammas(probs.argmax(-1))[0]) == 0.1
        )


def test_act_draws_from_log_probs() -> None:
    head = new_head(start=1.0, floor=0.05)
    uniform = torch.rand(6000, generator=seeded(4), dtype=torch.float64)
    index, logps = head.act(features(1).expand(6000, -1), uniform)
    law = head.log_probs(features(1))[0].exp()
    assert chi_square_p(index.bincount(minlength=3), law.detach()) > 1e-4
    assert torch.allclose(logps, law.log()[index])
    assert head.act(features(1), torch.tensor([1 - 1e-17], dtype=torch.float64))[0].tolist() == [2]


def test_loss_by_hand() -> None:
    head = new_head(floor=0.0)
    x = features(3)
    index = torch.tensor([0, 1, 2])
    logps = head.log_probs(x).detach()
    old = logps.gather(-1, index[:, None]).squeeze(-1) - torch.tensor([0.0, log(1.5), log(0.5)])
    advantages = torch.tensor([2.0, 1.0, -1.0])
    loss, metrics = threshold_loss(
        head, x, index, old, advantages, clip=0.2, entropy_coef=0.3, num_rows=6.0
    )
    entropy = -(logps.exp() * logps).sum()
    assert loss.item() == pytest.approx(-(2.0 + 1.2 - 0.8 + 0.3 * float(entropy)) / 6, abs=1e-5)
    assert float(metrics["sampler/clip_frac"]) == pytest.approx(2 / 6)
    assert float(metrics["sampler/entropy"]) == pytest.approx(float(entropy) / 6, abs=1e-5)


def test_its_gradient_is_the_enumerated_policy_gradient() -> None:
    """At the old policy, averaged over its own draws: grad sum_k pi_k R_k, for any baseline."""
    head = new_head()
    x = features(1)
    rewards = torch.tensor([0.3, -1.0, 2.0])
    probs = head.log_probs(x)[0].detach().exp()
    index = torch.arange(3)
    old = probs.log()
    weighted = probs * (rewards - 0.7)
    loss, _ = threshold_loss(
        head, x.expand(3, -1), index, old, weighted, clip=0.2, entropy_coef=0.0, num_rows=1.0
    )
    got = torch.autograd.grad(loss, list(head.parameters()))
    want = torch.autograd.grad(
        -(head.log_probs(x)[0].exp() * rewards).sum(), list(head.parameters())
    )
    assert max(float(w.abs().max()) for w in want) > 1e-3
    assert all(torch.allclose(g, w, atol=1e-6) for g, w in zip(got, want, strict=True))


def test_speed_is_worth_something_to_right_answers_only() -> None:
    reward = speed_reward(
        torch.tensor([1.0, 1.0, 0.1, 0.1]),
        torch.tensor([True, True, False, False]),
        torch.tensor([5, 20, 5, 20]),
        alpha=0.4,
        max_calls=20,
    )
    assert reward.tolist() == pytest.approx([0.9, 0.6, 0.1, 0.1])


def test_rows_that_made_no_call_teach_the_head_nothing() -> None:
    """A canvas that is full of anchors draws no gamma; its zeros in the step's record are no
    choice.
    """
    head = new_head()
    rollout = finished_rollout(
        [[1, 2], [1, 1], [2, 2], [0, 1]], [[1, 2], [0, 0], [2, 1], [0, 0]], eos_id=9
    )
    rollout = replace(rollout, gamma=torch.tensor([1.0, 0.0, 0.1, 0.0], dtype=torch.float64))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    sampler = Sampler(config=SamplerConfig(alpha=0.5), head=head, optimizer=optimizer, drawn={})
    gamma = sampler.gamma(rollout.prompt_mask, rollout.row_ids, seed=1, step=0)
    calls = torch.tensor([0, 2])
    gamma(torch.randn(2, rollout.ids.shape[1], 16, generator=seeded(3)), calls)
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0])
    correct = torch.tensor([True, True, False, True])
    done = Rewarded(
        rollout=rollout,
        examples=[],
        texts=[],
        rewards=rewards,
        parts={},
        correct=correct,
        anchored=~correct,
    )
    choices = sampler.choices(done)
    # 1 - .5 * 2 / 2 and 0, about their mean
    assert choices.advantages.tolist() == pytest.approx([0.25, -0.25])
    assert torch.equal(choices.index, sampler.drawn["index"][calls]) and len(choices.features) == 2
    none = Choices(**{name: value[:0] for name, value in choices.tensors().items()})
    metrics = sampler.backward(none, 0.0)
    assert all(float(value) == 0 for value in metrics.values())
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())
    assert sampler_metrics(rollout, 2) == {
        "sampler/log10_gamma": pytest.approx(-0.5),
        "sampler/exact_share": 0.0,
        "sampler/fewest_calls": 0.0,
    }
    assert set(sampler_metrics(rollout.rows(torch.tensor([1, 3])), 2).values()) == {0.0}


def test_the_fewest_calls_are_those_of_a_row_s_own_blocks() -> None:
    """Prompts of 1 to 7 tokens, completions of 10, in blocks of 4 from each row's first token."""
    rollout = decoded(toy(4), select="eb", gen_length=10, gamma=1e9)
    assert rollout.nfe.tolist() == num_blocks(rollout, 4).tolist() == [3, 3, 4, 3, 4]
    assert sampler_metrics(rollout, 4)["sampler/fewest_calls"] == 1.0
    slow = replace(rollout, nfe=rollout.nfe + 1)
    assert sampler_metrics(slow, 4)["sampler/fewest_calls"] == 0.0


def train_planted(shuffled: bool) -> ThresholdHead:
    """Hard prompts (feature 0 negative) are right only with gamma <= 0.1; calls fall with gamma; 8
    rollouts per prompt.
    """
    head = new_head(start=0.1)
    generator = seeded(6)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(400):
        prompts = torch.randn(16, 16, generator=generator)
        groups = torch.arange(16).repeat_interleave(8)
        x = prompts[groups]
        index, old = head.act(x, torch.rand(128, generator=generator, dtype=torch.float64))
        easy = x[:, 0] > 0
        # the control: what is worth it does not belong to the prompt that the head saw
        if shuffled:
            easy = easy[torch.randperm(16, generator=generator).repeat_interleave(8) * 8]
        correct = easy | (index <= 1)
        reward = speed_reward(
            correct.float(), correct, torch.tensor([20, 10, 2])[index], alpha=0.3, max_calls=20
        )
        loss, _ = threshold_loss(
            head,
            x,
            index,
            old,
            group_mean(reward, groups),
            clip=0.2,
            entropy_coef=0.0,
            num_rows=128.0,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def test_a_planted_task_is_learned_and_its_shuffled_control_is_not() -> None:
    x = features(400, seed=9)
    x = x[x[:, 0].abs() > 0.2]
    easy = x[:, 0] > 0

    def agreement(head: ThresholdHead) -> float:
        """Share of prompts with the right gamma: 1.0 where it is safe, 0.1 where it is not."""
        return float((head.best(x) == torch.where(easy, 2, 1)).double().mean())

    assert agreement(train_planted(shuffled=False)) > 0.9
    assert agreement(train_planted(shuffled=True)) < 0.65


def test_files_bring_it_back_and_decode_uses_it(tmp_path: Path) -> None:
    denoiser = tiny_llada(torch.float32)
    head = new_head(gammas=(0.0, 0.5, 50.0), start=0.5)
    with torch.no_grad():
        torch.nn.init.normal_(head.outer.weight, std=30.0, generator=seeded(5))
        torch.nn.init.zeros_(head.outer.bias)
    assert load_threshold(tmp_path) is None
    save_threshold(head, tmp_path)
    again = load_threshold(tmp_path)
    assert again is not None and torch.equal(
        again.log_probs(features(4)), head.log_probs(features(4))
    )
    assert not any(p.requires_grad for p in again.parameters())
    canvas = blank_canvas([[n] for n in range(9)], gen_length=6, denoiser=denoiser)
    gamma = best_gamma(again, canvas.prompt_mask)
    rollout = decode(
        denoiser, canvas, block_length=6, steps=6, select="eb", gamma=gamma, stop_at_eos=False
    )
    seen = prompt_features(denoiser.hidden(canvas.ids, canvas.attention_mask), canvas.prompt_mask)
    assert torch.equal(rollout.gamma, head.gammas(head.best(seen)))
    assert len(set(rollout.gamma.tolist())) > 1
    assert (rollout.nfe[rollout.gamma == 0] == 6).all() and (
        rollout.nfe[rollout.gamma == 50] == 1
    ).all()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    save_threshold(new_head(), tmp_path)
    config = json.loads((tmp_path / "threshold.json").read_text())
    for bad in (
        {**config, "d_model": 9},
        {k: v for k, v in config.items() if k != "gammas"},
        {**config, "gammas": [1.0, 2.0]},
    ):
        (tmp_path / "threshold.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"threshold.json: the threshold head cannot be read"):
            load_threshold(tmp_path)


@pytest.mark.parametrize(
    ("gammas", "start", "floor", "message"),
    [
        ((0.1, 1.0), 0.1, 0.02, "must start with 0"),
        ((0.0, 1.0, 0.5), 1.0, 0.02, "increase"),
        ((0.0,), 0.0, 0.02, "must start with 0"),
        ((0.0, 1.0), 0.5, 0.02, "start is the gamma"),
        ((0.0, 1.0), 1.0, 0.5, "floor is every gamma's least probability"),
    ],
)
def test_bad_grids_are_refused(gammas, start, floor, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid(gammas, start, floor)
    with pytest.raises(ValueError, match=message):
        ThresholdHead(4, gammas, start=start, floor=floor)
    check_grid(GAMMAS, 0.1, 0.02)
