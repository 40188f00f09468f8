"""The variance instrument on the toy: against enumeration of every mask, a closed form, and what
may not change it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import finished_rollout, seeded, tiny_llada
from unmaskrl.core.estimators import ESTIMATORS, Update, elbo, left_to_right, unigrpo
from unmaskrl.core.estimators.base import ONLY
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout
from unmaskrl.core.variance import (
    VERSIONS,
    Draws,
    compare_versions,
    draw_totals,
    ratio_of_means,
    rising_rows,
    rollout_version,
    step_metrics,
)

IDS = (0, 2, 1, 1)
STEPS = (0, 1, 2, 3)
EXIT = 3
PROMPT = 2
# what each version draws its masks from, and which token the exit view scores: token 0 is an
# anchor, token 3 the exit's
DRAWN = {"full": (0, 1, 2, 3), "free": (1, 2, 3), "free+exit": (1, 2)}
EXITS = {"full": (), "free": (), "free+exit": (3,)}


def toy(noise: float = 0.7) -> ToyDenoiser:
    return ToyDenoiser(
        torch.randn(81, generator=seeded(37), dtype=torch.float64),
        num_tokens=3,
        length=4,
        noise=noise,
    )


def pruned(copies: int) -> Rollout:
    """The same completion ``copies`` times, each a row of its own, with one anchor and one token of
    the exit call.
    """
    return finished_rollout([IDS] * copies, [STEPS] * copies, eos_id=4, exit_step=[EXIT] * copies)


def log_p(denoiser: ToyDenoiser, hidden: tuple[int, ...], position: int) -> float:
    ids = [0] * PROMPT + [denoiser.mask_id if c in hidden else IDS[c] for c in range(4)]
    logits = denoiser.logits(torch.tensor([ids]))[0, PROMPT + position]
    return float(logits[: denoiser.num_tokens].log_softmax(-1)[IDS[position]])


def exact_moments(denoiser: ToyDenoiser, version: str) -> tuple[float, float, float]:
    """Mean, variance and fourth central moment of one draw: every count n, every n-subset, and the
    exit's own term.
    """
    drawn = DRAWN[version]
    exits = EXITS[version]
    fixed = sum(log_p(denoiser, exits, i) for i in exits)
    cases = []
    for n in range(1, len(drawn) + 1):
        for subset in itertools.combinations(drawn, n):
            value = len(drawn) / n * sum(log_p(denoiser, subset + exits, i) for i in subset)
            cases.append((1 / (len(drawn) * math.comb(len(drawn), n)), value + fixed))
    mean = sum(p * v for p, v in cases)
    return (
        mean,
        sum(p * (v - mean) ** 2 for p, v in cases),
        sum(p * (v - mean) ** 4 for p, v in cases),
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_variance_is_that_of_every_mask_enumerated(version: str) -> None:
    denoiser = toy()
    rows = 60
    num_draws = 64
    mean, variance, fourth = exact_moments(denoiser, version)
    draws = compare_versions(
        denoiser, pruned(rows), elbo(num_mc=1), num_draws=num_draws, generator=seeded(1)
    )[version]
    count = rows * num_draws
    assert float(draws.totals.mean()) == pytest.approx(mean, abs=4 * (variance / count) ** 0.5)
    assert float(draws.variance.mean()) == pytest.approx(
        variance, abs=4 * ((fourth - variance**2) / count) ** 0.5
    )
    assert variance > 0.05  # so that 4 standard errors tell something
    num_free = {"full": 4, "free": 3, "free+exit": 3}[version]
    torch.testing.assert_close(draws.per_free, draws.variance / num_free**2)
    torch.testing.assert_close(draws.per_token, draws.variance / 16)
    assert draws.canvases == (2 if version == "free+exit" else 1)


def test_versions_have_different_exact_variances() -> None:
    exact = [exact_moments(toy(), version)[1] for version in VERSIONS]
    # else the test above could not tell them apart
    assert all(abs(a - b) > 0.05 for a, b in itertools.combinations(exact, 2))


def test_independent_draws_within_an_estimate_divide_the_variance() -> None:
    denoiser = toy()
    rows = 60
    num_draws = 64
    _, variance, fourth = exact_moments(denoiser, "free")
    estimator = elbo(num_mc=2, stratified=False)
    rollout = rollout_version(pruned(rows), "free")
    measured = draw_totals(
        denoiser, rollout, estimator, num_draws=num_draws, generator=seeded(2)
    ).variance.mean()
    # fourth central moment of the mean of two: (m4 + 3 v^2) / 8
    error = (((fourth + 3 * variance**2) / 8 - variance**2 / 4) / (rows * num_draws)) ** 0.5
    assert float(measured) == pytest.approx(variance / 2, abs=4 * error)


def test_closed_form_for_independent_tokens() -> None:
    """docs/theory.md 2.1: Var = f (H_f - 1) / (f - 1) * sum (c_i - mean c)^2 when no token's
    probability depends on another.
    """
    single = torch.randn(4, 3, generator=seeded(4), dtype=torch.float64).log_softmax(-1)
    joint = torch.stack(
        [single[range(4), list(ids)].sum() for ids in itertools.product(range(3), repeat=4)]
    )
    denoiser = ToyDenoiser(joint, num_tokens=3, length=4)
    draws = compare_versions(
        denoiser, pruned(150), elbo(num_mc=1), num_draws=64, generator=seeded(5)
    )
    for version, f in (("full", 4), ("free", 3)):
        costs = single[range(4), list(IDS)][4 - f :]
        growth = f * (sum(1 / k for k in range(1, f + 1)) - 1) / (f - 1)
        want = growth * float(((costs - costs.mean()) ** 2).sum())
        assert float(draws[version].variance.mean()) == pytest.approx(want, rel=0.08)


def test_versions_edit_a_copy() -> None:
    rollout = finished_rollout([IDS], [STEPS], eos_id=4, exit_step=[EXIT], left_pad=1)
    before = rollout.decoded_step.clone()
    full = rollout_version(rollout, "full")
    free = rollout_version(rollout, "free")
    assert rollout_version(rollout, "free+exit") is rollout
    assert torch.equal(rollout.decoded_step, before) and int(rollout.exit_step) == EXIT
    assert (
        int(full.anchor_mask.sum()) == int(full.exit_mask.sum()) == int(free.exit_mask.sum()) == 0
    )
    assert torch.equal(full.action_mask, rollout.completion_mask) and torch.equal(
        free.action_mask, rollout.action_mask
    )
    assert torch.equal(full.ids, rollout.ids) and bool(full.fixed_mask[0, :3].all())
    with pytest.raises(ValueError, match="version must be one of full, free, free"):
        rollout_version(rollout, "exit")


@pytest.mark.parametrize("name", ["elbo", "espo", "coupled", "sandwich", "mean_field"])
def test_rows_do_not_depend_on_batch_or_chunks(name: str) -> None:
    denoiser = tiny_llada()
    rollout = varied_rollout()
    estimator = ESTIMATORS[name]()

    def totals(some: Rollout, max_canvases: int) -> Tensor:
        return draw_totals(
            denoiser, some, estimator, num_draws=5, generator=seeded(3), max_canvases=max_canvases
        ).totals

    whole = totals(rollout, 4096)
    assert float(whole.var(1).max()) > 1e-3
    for max_canvases in (1, 7):
        torch.testing.assert_close(totals(rollout, max_canvases), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        totals(rollout.rows(torch.tensor([2, 0])), 4096), whole[[2, 0]], rtol=0, atol=1e-6
    )


def varied_rollout() -> Rollout:
    ids = [[1, 5, 3, 12, 13], [4, 4, 9, 2, 8], [7, 12, 3, 3, 3]]
    steps = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 3], [1, 2, 0, 3, 3]]
    return finished_rollout(ids, steps, eos_id=12, pad_id=13, exit_step=[0, 3, 0], left_pad=1)


def test_progress_counts_every_draw() -> None:
    for max_canvases in (1, 4, 4096):
        seen: list[int] = []
        draw_totals(
            toy(),
            pruned(2),
            elbo(),
            num_draws=7,
            generator=seeded(),
            max_canvases=max_canvases,
            on_draws=seen.append,
        )
        assert sum(seen) == 7 and (len(seen) == 7 or max_canvases == 4096)


def test_every_draw_is_an_update_of_its_own() -> None:
    seen: list[Update] = []
    inner = unigrpo()

    def make_views(rollout, mask_id, generator, update=ONLY):
        seen.append(update)
        return inner.make_views(rollout, mask_id, generator, update)

    draw_totals(
        toy(), pruned(1), inner._replace(make_views=make_views), num_draws=6, generator=seeded()
    )
    assert len({update.seed for update in seen}) == 6


def test_a_deterministic_estimator_has_no_variance_and_no_ratio() -> None:
    draws = compare_versions(toy(), pruned(3), left_to_right(), num_draws=4, generator=seeded())
    assert float(draws["full"].variance.max()) < 1e-20
    assert (
        ratio_of_means(draws["free"].variance, draws["full"].variance, torch.arange(3), seeded())
        is None
    )
    rises, share = rising_rows(draws["full"], draws["free"], seeded())
    assert not rises.any() and not share.any()


def test_anchors_have_no_truncated_law() -> None:
    """What scores draws would score anchors, in the version without pruning, among no ids."""
    rollout = pruned(1)
    assert bool((rollout.anchor_mask & rollout.completion_mask).any())
    kept = torch.where(
        rollout.action_mask[:, -rollout.gen_length :, None],
        rollout.ids[:, -rollout.gen_length :, None],
        -1,
    )
    truncated = replace(rollout, top_k=1, kept=kept.int())
    with pytest.raises(ValueError, match="it would score anchors, which were given"):
        compare_versions(toy(), truncated, left_to_right(), num_draws=2, generator=seeded())
    draws = compare_versions(toy(), truncated, elbo(), num_draws=2, generator=seeded())
    untouched = compare_versions(toy(), rollout, elbo(), num_draws=2, generator=seeded())
    assert draws["full"].totals.equal(untouched["full"].totals)


def test_ratio_interval_resamples_whole_groups() -> None:
    below = torch.rand(60, generator=seeded(), dtype=torch.float64) + 0.5
    exact = ratio_of_means(below / 2, below, torch.arange(60), seeded())
    assert exact is not None and list(exact) == pytest.approx([0.5, 0.5, 0.5])
    above = below * torch.rand(60, generator=seeded(1), dtype=torch.float64)
    alone = ratio_of_means(above, below, torch.arange(60), seeded())
    copied = ratio_of_means(above.repeat(4), below.repeat(4), torch.arange(60).repeat(4), seeded())
    assert alone is not None and copied is not None
    # copies of a row within its group add no information
    assert list(copied) == pytest.approx(list(alone))
    residual = above - alone.value * below
    half = 1.96 * float(residual.std() / below.mean()) / 60**0.5  # delta method
    assert (alone.high - alone.low) / 2 == pytest.approx(half, rel=0.15)


def test_rising_rows_are_told_from_falling_ones() -> None:
    totals = torch.randn(4, 64, generator=seeded(), dtype=torch.float64)
    base = Draws(
        totals=totals, num_free=torch.ones(4).long(), num_tokens=torch.ones(4).long(), canvases=1.0
    )
    scale = torch.tensor([2.0, 0.5, 1.0, 1.02], dtype=torch.float64)[:, None]
    rises, share = rising_rows(base, replace(base, totals=totals * scale), seeded())
    assert rises.tolist() == [1, 0, 0, 1]
    assert share.tolist() == [1, 0, 0, 1]  # paired draws: a scale of 1.02 is no noise
    other = replace(base, totals=torch.randn(4, 64, generator=seeded(8), dtype=torch.float64))
    assert bool(((rising_rows(base, other, seeded())[1] - 0.5).abs() < 0.5).all())


def test_step_metrics_leave_out_rows_without_actions() -> None:
    steps = [STEPS, (0, 0, 0, 0)]
    rollout = finished_rollout([IDS, IDS], steps, eos_id=4, exit_step=[EXIT, 0])
    options = {"num_draws": 8, "max_canvases": 64}
    both = step_metrics(toy(), rollout, elbo(), generator=seeded(), **options)
    alone = draw_totals(
        toy(), rollout.rows(torch.tensor([0])), elbo(), generator=seeded(), **options
    )
    assert both["likelihood/variance"] == pytest.approx(float(alone.variance))
    assert both["likelihood/variance_per_token"] == pytest.approx(float(alone.variance) / 9)
    nothing = step_metrics(
        toy(), rollout.rows(torch.tensor([1])), elbo(), generator=seeded(), **options
    )
    assert set(nothing.values()) == {None}


def test_one_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        draw_totals(toy(), pruned(1), elbo(), num_draws=1, generator=seeded())
