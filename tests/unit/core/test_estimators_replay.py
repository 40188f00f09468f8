"""Replays and exact chains on the toy's own rollouts; and what mean-field rollouts of a group can
share.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.conftest import finished_rollout, same_maths, seeded, tiny_llada
from tests.exact import CASES, PROMPT
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import left_to_right, mean_field, trajectory
from unmaskrl.core.scoring import count_canvases, token_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout

ROWS = 48
SETTINGS = [
    {"select": "entropy", "temperature": 1.0},
    {"select": "entropy", "temperature": 0.6, "exit_at": 0.5},
    {"select": "margin", "temperature": 0.0},
    {"select": "random", "temperature": 1.7, "steps": 2},
    {"select": "confidence", "temperature": 0.8, "block_length": 2},
    {"select": "left_to_right", "temperature": 1.0, "exit_at": 0.75},
]


def toy_for(eos_id: int | None) -> ToyDenoiser:
    return ToyDenoiser.random(
        seeded(21),
        num_tokens=3,
        length=4,
        noise=0.5,
        **({} if eos_id is None else {"eos_id": eos_id}),
    )


def decoded(toy: ToyDenoiser, *, steps: int = 4, block_length: int = 4, **options) -> Rollout:
    """Rollouts from canvases with no, one and two anchors."""
    anchors = ([{}, {1: 1}, {0: 0, 3: 1}] * ROWS)[:ROWS]
    canvas = anchored_canvas([[0, 1]] * ROWS, anchors, gen_length=4, denoiser=toy)
    return decode(
        toy, canvas, block_length=block_length, steps=steps, generator=seeded(3), **options
    )


def logps_of(toy, rollout: Rollout, made) -> Tensor:
    return token_logps(toy, rollout, made, made.make_views(rollout, toy.mask_id, seeded(1)))


@pytest.mark.parametrize("eos_id", [None, 2])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_exact_replay_equals_the_behavior_logps(options: dict, eos_id: int | None) -> None:
    toy = toy_for(eos_id)
    rollout = decoded(toy, **options)
    assert rollout.anchor_mask.any()
    assert bool(rollout.exit_mask.any()) == ("exit_at" in options)
    assert bool((~rollout.completion_mask[:, PROMPT:]).any()) == (eos_id is not None)
    want = torch.where(rollout.action_mask, rollout.behavior_logps, 0.0)
    assert float(want.sum(-1).max()) < -1e-3
    calls = int(rollout.nfe.max())
    for made in (trajectory(), trajectory(shrink=1)):
        assert torch.allclose(logps_of(toy, rollout, made), want, atol=1e-9)
    full = rollout.rows((rollout.nfe == calls).nonzero().squeeze(-1))
    same = logps_of(toy, full, trajectory(num_segments=calls))
    assert torch.allclose(same, torch.where(full.action_mask, full.behavior_logps, 0.0), atol=1e-9)


@pytest.mark.parametrize("eos_id", [None, 2])
def test_segments_partition_the_action_tokens(eos_id: int | None) -> None:
    """Each token is scored once, with weight 1, from a canvas that hides it and everything revealed
    later.
    """
    toy = toy_for(eos_id)
    rollout = decoded(toy, select="entropy", temperature=1.0, steps=4)
    calls = int(rollout.nfe.max())
    for made in [trajectory(num_segments=n) for n in range(1, calls + 3)] + [
        trajectory(shrink=n) for n in range(1, calls + 3)
    ]:
        views = made.make_views(rollout, toy.mask_id, seeded())
        assert torch.equal(views.weight.sum(1), rollout.action_mask.float())
        assert ((views.weight == 0) | (views.weight == 1)).all()
        for row, view in itertools.product(range(ROWS), range(views.ids.shape[1])):
            scored = views.weight[row, view] > 0
            if scored.any():
                first = rollout.decoded_step[row][scored].min()
                hidden = views.ids[row, view] == toy.mask_id
                assert hidden[rollout.decoded_step[row] >= first].all()
                assert not hidden[rollout.decoded_step[row] == 0].any()


def test_segments_have_equal_shares_of_the_calls() -> None:
    rollout = finished_rollout([[0] * 6], [[3, 1, 2, 6, 5, 4]], eos_id=9)

    def scored(**options) -> list[list[int]]:
        weight = trajectory(**options).make_views(rollout, 3, seeded()).weight[0]
        return [sorted(rollout.decoded_step[0][w > 0].tolist()) for w in weight]

    assert scored(num_segments=2) == [[1, 2, 3], [4, 5, 6]]
    assert scored(num_segments=3) == [[1, 2], [3, 4], [5, 6]]
    # segments start at floor(u T / N), as d2's do
    assert scored(num_segments=4) == [[1], [2, 3], [4], [5, 6]]
    assert scored(shrink=4) == [[1, 2, 3, 4], [5, 6]]
    assert scored() == [[1], [2], [3], [4], [5], [6]]


def test_one_segment_is_the_mean_field() -> None:
    """With an anchor behind the first EOS it is not: the true latent shows it, the mean field hides
    what follows EOS.
    """
    toy = toy_for(2)
    rollout = decoded(toy, select="entropy", temperature=1.0)
    one, field = (
        logps_of(toy, rollout, made)
        for made in (trajectory(num_segments=1), mean_field(p_mask_prompt=0.0))
    )
    behind = (rollout.anchor_mask & ~rollout.completion_mask).any(-1)
    assert 0 < int(behind.sum()) < ROWS
    assert same_maths(one[~behind], field[~behind])
    assert (one[behind] != field[behind]).any(-1).all()


def test_trajectory_drops_prompt_tokens_on_request() -> None:
    rollout = finished_rollout([[0, 1, 1]] * 300, [[1, 2, 3]] * 300, eos_id=9, prompt=10)
    ids = trajectory(p_mask_prompt=0.2).make_views(rollout, 3, seeded(4)).ids
    dropped = ids[..., :10] == 3
    assert abs(float(dropped[:, 0].double().mean()) - 0.2) < 4 * (0.16 / 3000) ** 0.5
    assert (dropped == dropped[:, :1]).all()


def prefix_logp(toy: ToyDenoiser, ids: Tensor, offsets: list[int]) -> float:
    """log p of these tokens at these offsets, everything else summed out."""
    keep = (toy.completions[:, offsets] == ids[offsets]).all(-1)
    return float(toy.log_joint()[keep].logsumexp(-1))


@pytest.mark.parametrize(
    "name", ["free", "two anchors", "anchors", "eos", "eos, anchors around it", "exit, anchors"]
)
@pytest.mark.parametrize("hide_anchors", [False, True])
def test_left_to_right_is_the_exact_log_likelihood_of_a_joint(
    name: str, hide_anchors: bool
) -> None:
    """Given the anchors up to the first EOS; with hidden anchors each token is given those before
    it alone.
    """
    case = CASES[name]
    toy = ToyDenoiser.random(seeded(31), num_tokens=3, length=4, eos_id=case.eos_id)
    got = float(logps_of(toy, case.rollout(), left_to_right(hide_anchors=hide_anchors)).sum())
    ids = torch.tensor(case.ids)
    if hide_anchors:
        want = sum(
            prefix_logp(toy, ids, list(range(i + 1))) - prefix_logp(toy, ids, list(range(i)))
            for i in case.actions
        )
    else:
        want = prefix_logp(toy, ids, list(range(case.end))) - prefix_logp(toy, ids, case.anchors)
    assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("eos_id", [None, 2])
def test_left_to_right_equals_the_behavior_logps_of_such_a_rollout(
    eos_id: int | None, temperature: float
) -> None:
    toy = toy_for(eos_id)
    rollout = decoded(toy, select="left_to_right", temperature=temperature)
    # An anchor behind the first EOS was visible in the rollout; the chain hides what is no part of
    # the completion.
    clean = ~(rollout.anchor_mask & ~rollout.completion_mask).any(-1)
    rollout = rollout.rows(clean.nonzero().squeeze(-1))
    assert len(rollout.ids) > 20 and rollout.anchor_mask.any()
    want = torch.where(rollout.action_mask, rollout.behavior_logps, 0.0)
    assert torch.allclose(logps_of(toy, rollout, left_to_right()), want, atol=1e-9)


def test_a_group_that_shares_its_prompt_mask_is_run_once() -> None:
    """Eight rollouts each of three prompts: 3 canvases instead of 24, the same values as if every
    row had its own copy.
    """
    denoiser = tiny_llada()
    groups = [g for g in range(3) for _ in range(8)]
    prompts = [[1 + g, 2, 3, 4, 5, 6, 7, 8] for g in groups]
    canvas = blank_canvas(prompts, gen_length=5, denoiser=denoiser, group_ids=groups)
    options = {"block_length": 5, "steps": 5, "select": "entropy", "temperature": 1.0}
    rollout = decode(denoiser, canvas, generator=seeded(1), **options)
    views = {
        share: mean_field(p_mask_prompt=0.4, share_prompt_mask=share).make_views(
            rollout, denoiser.mask_id, seeded(2)
        )
        for share in (True, False)
    }
    assert count_canvases(rollout, views[True]) == 3 < 20 < count_canvases(rollout, views[False])
    dropped = views[True].ids[:, 0, :8] == denoiser.mask_id
    masks = dropped.view(3, 8, 8)
    assert (masks == masks[:, :1]).all() and len({tuple(m.tolist()) for m in masks[:, 0]}) == 3
    logps = token_logps(denoiser, rollout, mean_field(share_prompt_mask=True), views[True])
    for row in (0, 9, 23):
        alone = denoiser.logits(views[True].ids[row, 0][None])[0].clone()
        alone[:, denoiser.mask_id] = float("-inf")
        want = (
            alone.log_softmax(-1).gather(-1, rollout.ids[row][:, None]).squeeze(-1)
            * rollout.action_mask[row]
        )
        assert torch.allclose(logps[row], want, atol=1e-9)


def test_shared_prompt_masks_drop_tokens_at_the_stated_rate() -> None:
    rows = 600
    rollout = finished_rollout([[0]] * rows, [[1]] * rows, eos_id=9, prompt=20)
    object.__setattr__(rollout, "group_ids", torch.arange(rows) // 2)
    dropped = (
        mean_field(share_prompt_mask=True).make_views(rollout, 3, seeded(2)).ids[::2, 0, :20] == 3
    )
    assert abs(float(dropped.double().mean()) - 0.15) < 4 * (0.15 * 0.85 / (300 * 20)) ** 0.5
