"""Exits inside the blocks of a block-causal model, against a slow decoder that walks every draw."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.block_rows import PROMPTS, SIZE, decoded, equal, exact_elbo, logps_of, toy
from tests.conftest import rounded, seeded
from tests.open_steps import restored
from unmaskrl.core import estimators
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import decode, exit_count, planned_calls
from unmaskrl.core.scoring import behavior_gap, frozen_token_logps, token_logps
from unmaskrl.core.toy import BlockToy
from unmaskrl.core.types import Rollout
from unmaskrl.core.variance import rollout_version

ANCHORS = [{}, {0: 1, 3: 2}, {4: 2, 5: 1, 6: 2, 7: 1}, dict.fromkeys(range(9), 1), {8: 2}]


def anchored(den: BlockToy, gen_length: int = 9, **options: Any) -> Rollout:
    canvas = anchored_canvas(PROMPTS, ANCHORS, gen_length=gen_length, denoiser=den)
    return decode(
        den,
        canvas,
        block_length=den.block_length or 0,
        generator=seeded(5),
        temperature=1.0,
        **options,
    )


def open_per_block(rollout: Rollout, row: int) -> list[list[int]]:
    """Columns that were open at the start, by block, of the whole canvas."""
    places = (rollout.decoded_step[row] > 0).nonzero().squeeze(-1).tolist()
    blocks = rollout.block_ids[row]
    return [list(one) for _, one in itertools.groupby(places, lambda i: int(blocks[i]))]


def same_decoding(a: Rollout, b: Rollout) -> None:
    for name in ("ids", "decoded_step", "nfe", "exit_step"):
        assert getattr(a, name).equal(getattr(b, name)), name
    equal(a.behavior_logps, b.behavior_logps)


@pytest.mark.parametrize("block_length", [1, 2, 4])
@pytest.mark.parametrize("select", ["entropy", "confidence", "random", "eb"])
@pytest.mark.parametrize("exit_at", [0.0, 0.3, 0.6])
def test_the_cache_changes_nothing(block_length: int, select: str, exit_at: float) -> None:
    den = toy(block_length, eos_id=0)
    for steps, stop in ((9, True), (5, False)):
        a, b = (
            decoded(den, select, steps=steps, exit_at=exit_at, stop_at_eos=stop, cached=cached)
            for cached in (True, False)
        )
        same_decoding(a, b)
        assert a.exited.equal(b.exited)
        assert bool(a.exited.any()) == (exit_count(block_length, exit_at) < block_length)


@pytest.mark.parametrize("select", ["entropy", "eb", "confidence"])
def test_an_exit_at_the_end_is_none(select: str) -> None:
    den = toy(3, eos_id=0)
    gamma = 0.5 if select == "eb" else None
    a, b = (
        anchored(den, steps=9, select=select, gamma=gamma, exit_at=exit_at)
        for exit_at in (1.0, None)
    )
    assert a.ids.equal(b.ids) and a.behavior_logps.equal(b.behavior_logps)
    assert a.decoded_step.equal(b.decoded_step) and a.block_exits is None


@pytest.mark.parametrize("exit_at", [0.0, 0.25, 0.5, 0.74])
@pytest.mark.parametrize("block_length", [2, 3, 4])
def test_a_block_exits_once_its_share_is_decided(exit_at: float, block_length: int) -> None:
    """A token per call up to the exit, which fills the rest of the block; anchors do not count."""
    rollout = anchored(toy(block_length), steps=9, select="random", exit_at=exit_at)
    for row in range(len(PROMPTS)):
        before = 0
        for columns in open_per_block(rollout, row):
            calls = rollout.decoded_step[row, columns].tolist()
            if max(calls) > int(rollout.nfe[row]):
                assert columns[-1] >= rollout.asked.stop, "nothing that was asked for is left"
                continue
            keep = math.ceil(exit_at * len(columns))
            rest = len(columns) - keep
            assert sorted(calls) == [
                *range(before + 1, before + keep + 1), *[before + keep + 1] * rest
            ]  # fmt: skip
            late = [call == before + keep + 1 for call in calls]
            assert rollout.exited[row, columns].tolist() == late
            before = max(calls)
        last = rollout.decoded_step[row, rollout.exited[row]]
        assert int(rollout.exit_step[row]) == max(last.tolist(), default=0)
    assert not bool((rollout.exit_mask & ~rollout.action_mask).any())


@pytest.mark.parametrize("steps", [2, 3, 5, 8])
@pytest.mark.parametrize("exit_at", [0.0, 0.3, 0.5, 0.8, 0.99])
def test_planned_calls_are_the_calls(steps: int, exit_at: float) -> None:
    den = toy(4)
    prompts = [[1] * 4, [1] * 2, [2, 1, 2, 1] * 2]  # the second one's last block is cut
    canvas = anchored_canvas(prompts, [{}, {0: 1}, {1: 1, 2: 0}], gen_length=8, denoiser=den)
    rollout = decode(
        den, canvas, block_length=4, steps=steps, select="left_to_right", temperature=1.0,
        exit_at=exit_at, generator=seeded(1),
    )  # fmt: skip
    planned = [
        planned_calls(sizes, 8, steps, exit_at, grid=4) for sizes in ([4, 4], [1, 4, 4], [2, 4])
    ]
    calls = rollout.nfe.tolist()
    assert calls[::2] == planned[::2] and calls[1] <= planned[1]
    for n in range(1, 9):
        k = -(-n * steps // 8)
        quotas = [n // k + (i < n % k) for i in range(k)]
        keep = exit_count(n, exit_at)
        before = next(i for i in range(k + 1) if sum(quotas[:i]) >= keep)
        assert planned_calls([n, 0, n], 8, steps, exit_at, grid=8) == 2 * (before + (n > keep))


def walk(den: BlockToy, ids: list[int], select: str, exit_at: float) -> dict[tuple, tuple]:
    """Log-probability and calls of every completion of a row, one token per call and block exits;
    ids hold the mask where a token is open.
    """
    length = den.block_length or 0
    ends: dict[tuple, tuple] = {}

    def go(ids: list[int], steps: list[int], logp: float, call: int) -> None:
        left = [i for i, token in enumerate(ids) if token == den.mask_id]
        if not left:
            ends[tuple(ids)] = (logp, steps)
            return
        block = left[0] // length
        inside = [i for i in left if i // length == block]
        total = sum(i // length == block for i in start)
        logps = logps_of(den, ids[: (block + 1) * length])
        if total - len(inside) < math.ceil(exit_at * total):
            surest = [float((logps[i].exp() * logps[i].clamp(min=-1e4)).sum()) for i in inside]
            inside = [inside[0] if select == "left_to_right" else inside[surest.index(max(surest))]]
        for tokens in itertools.product(range(den.mask_id), repeat=len(inside)):
            one = list(ids)
            when = list(steps)
            for i, token in zip(inside, tokens, strict=True):
                one[i] = token
                when[i] = call
            drawn = sum(float(logps[i, t]) for i, t in zip(inside, tokens, strict=True))
            go(one, when, logp + drawn, call + 1)

    start = [i for i, token in enumerate(ids) if token == den.mask_id]
    go(ids, [0] * len(ids), 0.0, 1)
    return ends


@pytest.mark.parametrize("select", ["entropy", "left_to_right"])
@pytest.mark.parametrize("exit_at", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("given", [{}, {2: 1}])
def test_all_completions_have_probability_one_and_the_recorded_one(
    select: str, exit_at: float, given: dict[int, int]
) -> None:
    """A block of two beside the prompt and one of three, of which the second may hold an anchor."""
    den = toy(3)
    ids = [1, *[given.get(i, den.mask_id) for i in range(5)]]
    ends = walk(den, ids, select, exit_at)
    assert len(ends) == 3 ** (5 - len(given))
    total = sum(math.exp(logp) for logp, _ in ends.values())
    assert total == rounded(1.0, size=1.0, dtype=torch.float64)
    canvas = anchored_canvas([[1]] * 300, [given] * 300, gen_length=5, denoiser=den)
    rollout = decode(
        den, canvas, block_length=3, steps=5, select=select, temperature=1.0, exit_at=exit_at,
        generator=seeded(2),
    )  # fmt: skip
    est = estimators.trajectory()
    scored = token_logps(den, rollout, est, est.make_views(rollout, den.mask_id, seeded(0)))
    assert rollout.exact and len(rollout.ids.unique(dim=0)) > 30
    expected = []
    for row in range(300):
        logp, steps = ends[tuple(rollout.ids[row, :6].tolist())]
        assert rollout.decoded_step[row, :6].tolist() == steps
        expected.append(logp)
    equal(rollout.behavior_logps.sum(-1), torch.tensor(expected, dtype=torch.float64))
    equal(scored.sum(-1), rollout.behavior_logps.sum(-1))


@pytest.mark.parametrize("block_length", [2, 4])
@pytest.mark.parametrize("select", ["entropy", "confidence", "eb", "random"])
def test_replays_are_exact_in_as_many_passes_as_a_block_has_calls(
    block_length: int, select: str
) -> None:
    den = toy(block_length, eos_id=0)
    gamma = 0.5 if select == "eb" else None
    rollout = anchored(den, steps=9, select=select, gamma=gamma, exit_at=0.5)
    most = planned_calls([block_length], 9, 9, 0.5, grid=block_length)
    all_times = estimators.two_mean_field(num_times=most)
    for est in (estimators.trajectory(), all_times):
        views = est.make_views(rollout, den.mask_id, seeded(0))
        assert views.ids.shape[1] <= most + (est is all_times)
        equal(token_logps(den, rollout, est, views), rollout.behavior_logps * rollout.action_mask)
    assert behavior_gap(den, rollout) < 1e-9


@pytest.mark.parametrize(
    "est",
    [
        estimators.elbo(num_mc=2),
        estimators.elbo(num_mc=2, antithetic=True),
        estimators.espo(),
    ],
    ids=["elbo", "antithetic", "espo"],
)
@pytest.mark.parametrize("exit_at", [0.0, 0.3])
def test_the_elbo_has_the_exits_of_all_blocks_in_one_exact_view(est: Any, exit_at: float) -> None:
    den = toy(4)
    rollout = decoded(den, gen_length=4, exit_at=exit_at)
    copies = 2000
    many = rollout.rows(torch.arange(len(PROMPTS)).repeat_interleave(copies))
    many = replace(many, row_ids=torch.arange(len(many.ids)))
    views = est.make_views(many, den.mask_id, seeded(2))
    hidden = views.ids == den.mask_id
    exits = many.exit_mask
    assert views.ids.shape[1] == est.num_views(4, 4, True) == 3
    assert bool((hidden | ~exits[:, None]).all()), "exits are hidden in every view"
    assert views.weight[:, -1].equal(exits.to(views.weight.dtype))
    assert not bool((hidden[:, -1] & many.completion_mask & ~exits).any())
    assert not bool((views.weight[:, :-1] * exits[:, None]).any()), "and scored in one"
    exited = [
        set(rollout.block_ids[row, exits].tolist()) for row, exits in enumerate(rollout.exit_mask)
    ]
    assert max(map(len, exited)) == 2
    values = frozen_token_logps(den, many, est, views, max_canvases=10**6).sum(-1)
    for row, mine in enumerate(values.view(len(PROMPTS), copies)):
        exact = exact_elbo(den, rollout, row)
        error = float(mine.std() / copies**0.5)
        assert abs(float(mine.mean()) - exact) < 5 * error + 1e-9 * abs(exact)
        if exit_at == 0:  # nothing is random: every block is one exit
            assert float(mine[0]) == rounded(exact, size=SIZE, dtype=torch.float64)


def test_where_exits_are_not_known_of_they_are_free_tokens() -> None:
    rollout = anchored(toy(4), steps=9, select="entropy", exit_at=0.5)
    free = rollout_version(rollout, "free")
    assert bool(rollout.exit_mask.any()) and not bool(free.exit_mask.any())
    assert free.decoded_step.equal(rollout.decoded_step)


def test_a_checkpoint_of_an_open_step_keeps_them_and_an_older_one_loads() -> None:
    rollout = anchored(toy(4), steps=9, select="entropy", exit_at=0.5)
    assert restored(rollout).exit_mask.equal(rollout.exit_mask)
    assert restored(rollout.rows(torch.tensor([2, 0]))).exit_mask.equal(rollout.exit_mask[[2, 0]])
    plain = anchored(toy(4), steps=9, select="entropy")
    assert restored(plain).block_exits is None and not bool(restored(plain).exit_mask.any())
    older = restored(rollout, "block_exits")
    assert older.block_exits is None and older.ids.equal(rollout.ids)
