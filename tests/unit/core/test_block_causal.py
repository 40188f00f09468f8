"""Block-causal decoding and scoring, against plain enumeration on compact rows without pads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.block_rows import PROMPTS, SIZE, compact, decoded, equal, exact_elbo, logps_of, toy
from tests.conftest import rounded, same_maths, seeded
from unmaskrl.core import estimators, scoring
from unmaskrl.core.block_causal import BlockCausal, CachedBlocks, hidden_beside_clean
from unmaskrl.core.canvas import anchored_canvas, blank_canvas, predictability
from unmaskrl.core.decoding import decode, planned_calls
from unmaskrl.core.scoring import (
    behavior_gap,
    count_canvases,
    frozen_token_logps,
    replay_views,
    token_logps,
    view_logps,
)
from unmaskrl.reporting.notebook import rollout_row


@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
@pytest.mark.parametrize("select", ["entropy", "confidence", "random", "left_to_right", "eb"])
@pytest.mark.parametrize("steps", [3, 5, 9])
def test_the_cache_changes_nothing(block_length: int, select: str, steps: int) -> None:
    """Prompts of every remainder in one batch; rows that end early; a last block that is cut."""
    den = toy(block_length, eos_id=0)
    for stop in (True, False):
        a, b = (
            decoded(den, select, steps=steps, stop_at_eos=stop, cached=cached)
            for cached in (True, False)
        )
        assert a.ids.equal(b.ids) and a.decoded_step.equal(b.decoded_step)
        equal(a.behavior_logps, b.behavior_logps)


def test_anchors_that_fill_whole_blocks_are_cached() -> None:
    """One row's next block is given, so that the call after runs three blocks."""
    den = toy(2)
    anchors = [{}, {0: 1, 1: 1, 4: 2, 5: 2, 6: 2}, {7: 1}, {2: 2, 3: 2}, dict.fromkeys(range(8), 1)]
    canvas = anchored_canvas(PROMPTS, anchors, gen_length=8, denoiser=den)
    options: dict[str, Any] = {
        "block_length": 2,
        "steps": 8,
        "select": "margin",
        "temperature": 1.0,
    }
    a, b = (
        decode(den, canvas, generator=seeded(1), cached=cached, **options)
        for cached in (True, False)
    )
    assert a.ids.equal(b.ids) and a.decoded_step.equal(b.decoded_step)
    equal(a.behavior_logps, b.behavior_logps)
    assert int(a.anchor_mask.sum()) == sum(map(len, anchors)), "pads are no anchors"
    assert int(a.nfe[4]) == 0 and not bool((a.ids == den.mask_id).any()), "nothing is asked for"


@pytest.mark.parametrize("keep_stale", [False, True])
def test_a_finished_block_is_stored_clean(
    keep_stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the clean run of a finished block the log-probabilities are wrong by far."""
    den = toy(3)
    honest = decoded(den, "left_to_right", cached=False)
    if keep_stale:
        go_on = CachedBlocks.go_on

        def stale(
            self: CachedBlocks, ids: Tensor, rows: Tensor, block: Tensor, behind: int, end: int
        ) -> Tensor:
            self.last[rows] = block
            return go_on(self, ids, rows, block, 0, end)

        monkeypatch.setattr(CachedBlocks, "go_on", stale)
    gap = (decoded(den, "left_to_right").behavior_logps - honest.behavior_logps).abs().max()
    assert gap > 0.1 if keep_stale else gap < 1e-9


@pytest.mark.parametrize("block_length", [2, 3])
def test_tokens_are_drawn_from_their_block_over_finished_ones(block_length: int) -> None:
    """Each recorded log-probability, from the row alone, cut behind the block."""
    den = toy(block_length)
    rollout = decoded(den, steps=5)
    for row in range(len(PROMPTS)):
        ids, calls, prompt = compact(rollout, row)
        assert len(ids) % block_length == 0 and len(ids) >= prompt + 9
        recorded = rollout.behavior_logps[row, rollout.attention_mask[row]]
        for place in range(prompt, len(ids)):
            if calls[place] > int(rollout.nfe[row]):  # behind the completion, and not needed
                assert place >= prompt + 9 and ids[place] == den.eos_id
                continue
            end = (place // block_length + 1) * block_length
            seen = [den.mask_id if calls[i] >= calls[place] else ids[i] for i in range(end)]
            expected = logps_of(den, seen)[place, ids[place]]
            assert float(recorded[place]) == rounded(
                float(expected), size=SIZE, dtype=torch.float64
            )


def test_a_row_is_the_same_alone() -> None:
    den = toy(4, eos_id=0)
    together = decoded(den)
    for row, prompt in enumerate(PROMPTS):
        canvas = blank_canvas([prompt], gen_length=9, denoiser=den, row_ids=[row])
        alone = decode(
            den, canvas, block_length=4, steps=9, select="entropy", temperature=1.0,
            generator=seeded(3),
        )  # fmt: skip
        real = together.attention_mask[row]
        assert together.ids[row, real].equal(alone.ids[0, alone.attention_mask[0]])
        assert together.nfe[row] == alone.nfe[0]


@pytest.mark.parametrize("steps", [3, 4, 9])
def test_calls_are_the_planned_ones_and_tokens_those_of_blocks(steps: int) -> None:
    """A row runs its prompt and first block, then a block per call and each finished block once."""
    den = toy(4)
    run: list[int] = []
    plain = den.hidden_under
    den.hidden_under = lambda ids, *rest: run.append(ids.numel()) or plain(ids, *rest)  # type: ignore[method-assign]
    rollout = decoded(den, steps=steps)
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt) + 9
        ends = [0, *range(-len(prompt) % 4 or 4, 13, 4)]
        whole = -(-length // 4) * 4 - len(prompt)
        sizes = [b - a for a, b in itertools.pairwise([e for e in ends if e < whole] + [whole])]
        planned = planned_calls(sizes, 9, steps)
        asked = rollout.decoded_step[row, rollout.asked]
        assert int(rollout.nfe[row]) == int(asked.max()) <= planned
        if whole == 9:
            assert int(rollout.nfe[row]) == planned
    alone = blank_canvas([[1, 2, 1, 2]], gen_length=8, denoiser=den)
    run.clear()
    row = decode(den, alone, block_length=4, steps=8, select="entropy")
    assert int(row.nfe) == 8 and sum(run) == 8 + 3 * 4 + 8 + 3 * 4


@pytest.mark.parametrize("select", ["entropy", "confidence", "eb", "left_to_right", "random"])
@pytest.mark.parametrize("cached", [True, False])
def test_what_completes_a_block_is_decoded_while_it_can_matter(select: str, cached: bool) -> None:
    """What was asked for is that of a completion of whole blocks; the calls after it are saved."""
    den = toy(4)
    saved = 0
    for row, prompt in enumerate(PROMPTS):
        whole = 9 + -(len(prompt) + 9) % 4
        rollouts = []
        for gen_length in (9, whole):
            canvas = blank_canvas([prompt], gen_length=gen_length, denoiser=den, row_ids=[row])
            rollouts.append(
                decode(
                    den, canvas, block_length=4, steps=gen_length, select=select, temperature=1.0,
                    gamma=0.3 if select == "eb" else None, generator=seeded(3), cached=cached,
                )
            )  # fmt: skip
        short, long = rollouts
        asked = slice(len(prompt), len(prompt) + 9)
        for name in ("ids", "decoded_step"):
            assert getattr(short, name)[0, asked].equal(getattr(long, name)[0, asked])
        equal(short.behavior_logps[0, asked], long.behavior_logps[0, asked])
        assert int(short.nfe) == int(short.decoded_step[0, short.asked].max())
        saved += int(long.nfe - short.nfe)
        exact = estimators.trajectory()
        views = exact.make_views(short, den.mask_id, seeded())
        scored = token_logps(den, short, exact, views)
        equal(scored, short.behavior_logps * short.action_mask)
        assert behavior_gap(den, short) < 1e-9
    assert saved > 0 or select == "confidence", "which has no such order in these rows"


@pytest.mark.parametrize("block_length", [1, 2, 4])
@pytest.mark.parametrize("select", ["entropy", "eb", "left_to_right"])
def test_an_exact_likelihood_takes_as_many_passes_as_a_block_has_calls(
    block_length: int, select: str
) -> None:
    den = toy(block_length, eos_id=0)
    rollout = decoded(den, select)
    est = estimators.trajectory()
    views = est.make_views(rollout, den.mask_id, seeded(0))
    assert views.ids.shape[1] == int(rollout.num_local_steps.max()) <= block_length
    assert count_canvases(rollout, views) <= block_length * len(PROMPTS)
    logps = token_logps(den, rollout, est, views)
    equal(logps, rollout.behavior_logps * rollout.action_mask)
    assert behavior_gap(den, rollout) < 1e-9
    replayed = view_logps(den, rollout, replay_views(rollout, den.mask_id)).sum(1)
    drawn = (rollout.decoded_step > 0) & (rollout.decoded_step <= rollout.nfe[:, None])
    equal(replayed, rollout.behavior_logps * drawn)
    all_times = estimators.two_mean_field(num_times=block_length)
    views = all_times.make_views(rollout, den.mask_id, seeded(0))
    equal(frozen_token_logps(den, rollout, all_times, views, max_canvases=3), logps)


def test_probabilities_of_all_completions_sum_to_one() -> None:
    """Two blocks of two, the first shared with the prompt: all V^4 ways to fill three and a cut
    one.
    """
    den = toy(2)
    canvas = blank_canvas([[1]], gen_length=3, denoiser=den)
    one = decode(den, canvas, block_length=2, steps=3, select="left_to_right")
    real = int(one.attention_mask.sum()) - 1
    ways = torch.tensor(list(itertools.product(range(3), repeat=real)))
    rollout = one.rows(torch.zeros(len(ways), dtype=torch.int64))
    ids = rollout.ids.clone()
    ids[:, 1 : 1 + real] = ways
    rollout = replace(rollout, ids=ids, row_ids=torch.arange(len(ways)))
    est = estimators.trajectory()
    logps = token_logps(den, rollout, est, est.make_views(rollout, den.mask_id, seeded(0)))
    assert real == 3 and float(logps.sum(-1).exp().sum()) == rounded(
        1.0, size=1.0, dtype=torch.float64
    )


@pytest.mark.parametrize(
    "est",
    [
        estimators.elbo(num_mc=2),
        estimators.elbo(num_mc=1, stratified=False),
        estimators.elbo(num_mc=4, antithetic=True),
        estimators.espo(),
    ],
    ids=["elbo", "one", "antithetic", "espo"],
)
def test_the_elbo_is_that_of_each_block_given_the_blocks_before(est: Any) -> None:
    den = toy(3)
    rollout = decoded(den, gen_length=4)
    copies = 4000
    many = rollout.rows(torch.arange(len(PROMPTS)).repeat(copies))
    many = replace(many, row_ids=torch.arange(len(many.ids)))
    views = est.make_views(many, den.mask_id, seeded(2))
    values = frozen_token_logps(den, many, est, views, max_canvases=10**6).sum(-1)
    values = values.double().view(copies, len(PROMPTS))
    for row in range(len(PROMPTS)):
        error = float(values[:, row].std() / copies**0.5)
        exact = exact_elbo(den, rollout, row)
        assert abs(float(values[:, row].mean()) - exact) < 5 * error + 1e-9 * abs(exact)


def test_most_predictable_scores_see_the_reference_in_blocks_before() -> None:
    den = toy(3)
    prompts = PROMPTS[:3]
    references = [[1, 2, 0, 1, 2], [2, 2, 0], [0, 1, 1, 2]]
    scores = predictability(den, prompts, references)
    for prompt, reference, row in zip(prompts, references, scores, strict=True):
        ids = [*prompt, *reference]
        for i, score in enumerate(row):
            place = len(prompt) + i
            block = place // 3
            seen = [
                den.mask_id if at >= max(len(prompt), 3 * block) else ids[at]
                for at in range(3 * block + 3)
            ]
            expected = float(logps_of(den, seen)[place, ids[place]])
            assert score == rounded(expected, size=SIZE, dtype=torch.float64)


def test_a_view_is_counted_per_block() -> None:
    """One draw of the ELBO scores at least one token of every block, with weight c / n."""
    den = toy(4)
    rollout = decoded(den)
    views = estimators.elbo(num_mc=3).make_views(rollout, den.mask_id, seeded(1))
    for row in range(len(PROMPTS)):
        for block in set(rollout.block_ids[row, rollout.action_mask[row]].tolist()):
            inside = (rollout.block_ids[row] == block) & rollout.action_mask[row]
            size = int(inside.sum())
            weight = views.weight[row][:, inside]
            number = (weight > 0).sum(-1)
            assert bool((number > 0).all()), "every view scores every block"
            assert (weight.sum(-1) * 3).tolist() == pytest.approx([size] * 3)
    assert bool(((views.ids == den.mask_id) >= (views.weight != 0)).all()), "scored means hidden"


def test_the_mean_field_hides_a_block_and_sees_the_blocks_before() -> None:
    den = toy(3)
    rollout = decoded(den)
    est = estimators.mean_field(p_mask_prompt=0.0)
    views = est.make_views(rollout, den.mask_id, seeded(0))
    ours = token_logps(den, rollout, est, views)
    for row in range(len(PROMPTS)):
        ids, _, prompt = compact(rollout, row)
        first = int(rollout.attention_mask[row].long().argmax())
        for place in range(prompt, prompt + 9):
            block = place // 3
            seen = [
                den.mask_id if i >= max(prompt, 3 * block) else ids[i] for i in range(3 * block + 3)
            ]
            expected = float(logps_of(den, seen)[place, ids[place]])
            assert float(ours[row, first + place]) == rounded(
                expected, size=SIZE, dtype=torch.float64
            )


def test_nothing_leaks_between_blocks() -> None:
    """A noisy token reaches its own block of its own copy; a clean one the blocks behind its own
    in every copy.
    """
    den = toy(3)
    rollout = decoded(den)
    blocks = rollout.block_ids
    noisy = rollout.ids[:, None].repeat(1, 3, 1)
    args = (rollout.attention_mask, 0)
    plain = hidden_beside_clean(den, noisy, rollout.ids, *args)
    row, copy, column = 2, 1, 8
    own = int(blocks[row, column])
    later = list(range(own + 1, int(blocks[row].max()) + 1))
    for half, reached in enumerate(({copy: [own]}, dict.fromkeys(range(3), later))):
        changed = [noisy.clone(), rollout.ids.clone()]
        changed[half][(row, copy, column) if half == 0 else (row, column)] = den.mask_id
        moved = (hidden_beside_clean(den, *changed, *args) - plain).abs().amax(-1) > 0
        assert not bool(moved[[0, 1, 3, 4]].any()), "other rows"
        found = moved[row] & rollout.attention_mask[row]
        assert {k: blocks[row][one].unique().tolist() for k, one in enumerate(found)} == {
            k: reached.get(k, []) for k in range(3)
        }


@pytest.mark.parametrize("num_mc", [1, 3, 5, 9])
def test_views_of_a_row_share_its_clean_half(num_mc: int) -> None:
    """As each alone, values and gradients, for fewer tokens; in chunks too."""
    den = toy(3)
    den.table.requires_grad_()
    rollout = decoded(den)
    est = estimators.elbo(num_mc=num_mc)
    views = est.make_views(rollout, den.mask_id, seeded(0))
    tokens: list[int] = []
    plain = den.hidden_under

    def counted(ids: Tensor, *rest: Any) -> Tensor:
        tokens.append(ids.numel())
        return plain(ids, *rest)

    def scored() -> tuple[Tensor, Tensor]:
        logps = token_logps(den, rollout, est, views)
        return logps, torch.autograd.grad(logps.sum(), den.table)[0]

    with mock.patch.object(den, "hidden_under", counted):
        together, ours = scored()
        with mock.patch.object(scoring, "MOST_COPIES", 1):
            alone, theirs = scored()
    equal(together, alone)
    assert same_maths(ours, theirs)
    for limit in (1, 4):
        equal(frozen_token_logps(den, rollout, est, views, max_canvases=limit), together)
    shared, separate = tokens
    assert shared == separate if num_mc == 1 else shared < 0.8 * separate


def test_what_completes_the_last_block_is_no_part_of_what_is_shown() -> None:
    rollout = decoded(toy(4), gen_length=9)
    assert repr(rollout).startswith("Rollout(5 rows, 9 completion tokens, 0 anchors")
    for row in range(len(PROMPTS)):
        assert rollout.completions()[row] == rollout.ids[row, rollout.asked].tolist()
        assert len(rollout_row(rollout, row)["decoded_step"]) == 9


def test_what_a_block_causal_model_refuses() -> None:
    den = toy(4)
    assert isinstance(den, BlockCausal)
    canvas = blank_canvas(PROMPTS, gen_length=8, denoiser=den)
    with pytest.raises(ValueError, match=r"block_length 8 is not the model's.*blocks of 4"):
        decode(den, canvas, block_length=8, steps=8)
    rollout = decoded(den)
    est = estimators.unigrpo()
    views = est.make_views(rollout, den.mask_id, seeded(0))
    with pytest.raises(ValueError, match="mean nothing for a block-causal model"):
        token_logps(den, rollout, est, views)
