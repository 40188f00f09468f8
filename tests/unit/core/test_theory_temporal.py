"""Temporal pruning and the ELBO (docs/theory.md 3): mean, variance and bias of every estimator of
the pruned process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from benchmarks.exact import (
    Outcomes,
    conditional_logps,
    elbo_outcomes,
    exit_outcomes,
    growth,
    moments,
    order_elbo,
    score,
    single_draw_outcomes,
    truncated_growth,
    truncated_outcomes,
)
from tests.conftest import seeded
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import elbo
from unmaskrl.core.scoring import token_logps
from unmaskrl.core.toy import ToyDenoiser

LENGTH = 4
NUM_TOKENS = 3
ALL = range(LENGTH)
GRID = [NUM_TOKENS] * LENGTH
NOISE = [0.0, 0.7]


def table_of(noise: float = 0.0, seed: int = 0) -> Tensor:
    toy = ToyDenoiser.random(seeded(seed), num_tokens=NUM_TOKENS, length=LENGTH, noise=noise)
    return conditional_logps(toy.log_weights, NUM_TOKENS, LENGTH, toy.tilt)


def context_free(length: int = 5) -> tuple[Tensor, Tensor]:
    """A product joint's table and losses (length, N)."""
    logits = 1.5 * torch.randn(length, 2, generator=seeded(7), dtype=torch.float64)
    ids = torch.tensor(list(itertools.product(range(2), repeat=length)))
    weights = logits[torch.arange(length), ids].sum(-1)
    return conditional_logps(weights, 2, length), -logits.log_softmax(-1)[
        torch.arange(length), ids
    ].T


def exit_sets(e: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(ALL, e))


def without(dropped: Sequence[int]) -> list[int]:
    return [i for i in ALL if i not in dropped]


def pruned_elbo(table: Tensor, e: int) -> Tensor:
    """The oracle over random exit sets: all but the last e tokens one by one, and the mean of one
    pass over e tokens.
    """
    last = torch.stack([score(table, m, m) for m in exit_sets(e)]).mean(0)
    return order_elbo(table, ALL, stop=e) + last


def averaged(table: Tensor, e: int) -> Outcomes:
    """Ours with the exit set itself drawn uniformly: the law of total probability, outcome by
    outcome.
    """
    sets = exit_sets(e)
    return [
        (p / len(sets), v) for last in sets for p, v in elbo_outcomes(table, without(last), last)
    ]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("e", [1, 2, 3])
def test_all_estimators_have_the_pruned_elbo_as_mean(e: int, noise: float) -> None:
    table = table_of(noise)
    want = pruned_elbo(table, e)
    truncated = moments(truncated_outcomes(table, ALL, e))[0]
    last = moments(exit_outcomes(table, ALL, e))[0]
    assert torch.allclose(truncated, order_elbo(table, ALL, stop=e), atol=1e-9)
    for mean in (
        truncated + last,
        moments(single_draw_outcomes(table, ALL, e))[0],
        moments(averaged(table, e))[0],
    ):
        assert torch.allclose(mean, want, atol=1e-9)
    assert (order_elbo(table, ALL, stop=e) - want).min() > 0.01  # what truncation alone leaves out


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("e", [1, 2])
def test_ours_is_the_bound_of_the_exit_set_that_happened(e: int, noise: float) -> None:
    """Given E: R in random order with E masked, then E in one pass, which adds no noise. The bounds
    differ from E to E, except for single tokens of a consistent joint, where each is log p(y).
    """
    table = table_of(noise)
    means = []
    for last in exit_sets(e):
        orders = list(itertools.permutations(without(last)))
        want = sum(
            (score(table, (*o[k:], *last), [o[k]]) for o in orders for k in range(len(o))),
            torch.zeros(81).double(),
        )
        mean, variance = moments(elbo_outcomes(table, without(last), last))
        assert torch.allclose(mean, want / len(orders) + score(table, last, last), atol=1e-9)
        rest = [
            (p, v - score(table, last, last)) for p, v in elbo_outcomes(table, without(last), last)
        ]
        assert torch.allclose(variance, moments(rest)[1], atol=1e-12)
        means.append(mean)
    apart = float(torch.stack(means).std(0).max())
    assert apart < 1e-9 if e == 1 and noise == 0 else apart > 0.1


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("e", [1, 2, 3])
def test_truncation_is_the_conditional_mean_of_ours_over_exit_sets(e: int, noise: float) -> None:
    """Given the hidden set N, averaged over which e of its tokens are the exit, ours without the
    exit term is the truncated estimator; so a random exit set has at least its variance, and ours
    is that minus the spread of the bounds of the sets.
    """
    table = table_of(noise)
    r = LENGTH - e
    for n in range(e + 1, LENGTH + 1):
        for hidden in itertools.combinations(ALL, n):
            parts = [
                r / (n - e) * score(table, hidden, [i for i in hidden if i not in last])
                for last in itertools.combinations(hidden, e)
            ]
            assert torch.allclose(
                torch.stack(parts).mean(0), r / n * score(table, hidden, hidden), atol=1e-9
            )
    sets = exit_sets(e)
    given = [moments(elbo_outcomes(table, without(last), last)) for last in sets]
    inner = torch.stack([v for _, v in given]).mean(0)
    between = torch.stack([m for m, _ in given]).var(0, correction=0)
    assert torch.allclose(moments(averaged(table, e))[1], inner + between, atol=1e-9)
    bare = [
        (p, v - score(table, last, last))
        for last in sets
        for p, v in elbo_outcomes(table, without(last), last)
    ]
    loose = moments([(p / len(sets), v) for p, v in bare])[1]
    assert (moments(truncated_outcomes(table, ALL, e))[1] <= loose + 1e-12).all()


@pytest.mark.parametrize("e", [1, 2, 3, 4])
def test_context_free_variances_are_closed_forms(e: int) -> None:
    """f = 5. Truncated: r (H_f - H_e - r/f) Q / (f-1). Exit draw: e (1 - e/f) Q / (f-1). Ours: g(r)
    Q_R. One draw for both: a term r (e-1)^2 cbar^2 that does not vanish with the spread Q.
    """
    table, cost = context_free()
    f = 5
    r = 5 - e
    mean = cost.mean(0)
    q = ((cost - mean) ** 2).sum(0)
    truncated = moments(truncated_outcomes(table, range(f), e))[1]
    last = moments(exit_outcomes(table, range(f), e))[1]
    assert torch.allclose(truncated, truncated_growth(f, e) * q, atol=1e-9)
    assert torch.allclose(last, e * (1 - e / f) * q / (f - 1), atol=1e-9)
    full = moments(elbo_outcomes(table, range(f)))[1]
    assert (truncated + last <= full + 1e-12).all()
    within = sum(
        (r + 1) * (1 if n == e else 1 / n) ** 2 * n * (1 - n / f) for n in range(e, f + 1)
    ) / (f - 1)
    single = moments(single_draw_outcomes(table, range(f), e))[1]
    assert torch.allclose(single, within * q + r * (e - 1) ** 2 * mean**2, atol=1e-9)
    for exits in itertools.combinations(range(f), e):
        rest = [i for i in range(f) if i not in exits]
        spread = ((cost[rest] - cost[rest].mean(0)) ** 2).sum(0)
        ours = moments(elbo_outcomes(table, rest, exits))[1]
        assert torch.allclose(ours, growth(r) * spread, atol=1e-9)
        assert (ours <= full + 1e-12).all()


def test_closed_forms_fall_with_the_exit_and_their_sum_stays_below_the_full_variance() -> None:
    """Exactly, in fractions, for every f up to 40: truncated + exit draw <= full, and truncated
    falls with e.
    """
    for f in range(2, 41):
        harmonic = [
            sum((Fraction(1, k) for k in range(1, e + 1)), Fraction(0)) for e in range(f + 1)
        ]
        truncated = [
            (f - e) * (harmonic[f] - harmonic[e] - Fraction(f - e, f)) / (f - 1) for e in range(f)
        ]
        assert all(a > b for a, b in itertools.pairwise(truncated))
        assert truncated[0] == f * (harmonic[f] - 1) / (f - 1)
        for e in range(1, f):
            assert truncated_growth(f, e) == pytest.approx(float(truncated[e]), rel=1e-9, abs=1e-12)
            assert truncated[e] + Fraction(e * (f - e), f * (f - 1)) <= truncated[0]


def test_one_draw_for_both_is_noisy_where_the_full_estimator_is_exact() -> None:
    """Equal losses of ln 3: the full ELBO has no variance, the single draw r (e-1)^2 ln(3)^2; with
    e = 1 they are the same.
    """
    table = conditional_logps(torch.zeros(81, dtype=torch.float64), NUM_TOKENS, LENGTH)
    assert moments(elbo_outcomes(table, ALL))[1].max() < 1e-20
    for e in (1, 2, 3):
        want = (LENGTH - e) * (e - 1) ** 2 * math.log(3) ** 2
        assert moments(single_draw_outcomes(table, ALL, e))[1].tolist() == pytest.approx(
            [want] * 81, abs=1e-9
        )
    table = table_of(0.7)
    one = single_draw_outcomes(table, ALL, 1)
    full = elbo_outcomes(table, ALL)
    assert torch.allclose(moments(one)[1], moments(full)[1], atol=1e-9)


def exit_gap(table: Tensor, last: Sequence[int]) -> Tensor:
    """L_full - L_pruned (nats) at exit set E: its tokens one by one in random order, minus all in
    one pass.
    """
    return order_elbo(table, last) - score(table, last, last)


def conditional_mean(values: Tensor, law: Tensor, last: Sequence[int]) -> Tensor:
    """E[values | tokens outside E] under ``law``, for every context (kept as size-1 axes)."""
    law = law.reshape(GRID)
    return (law * values.reshape(GRID)).sum(tuple(last)) / law.sum(tuple(last))


@pytest.mark.parametrize("e", [2, 3])
def test_bias_of_the_exit_is_conditional_total_correlation(e: int) -> None:
    """A consistent joint, text of that joint: for every E and context the mean gap is KL(p(y_E |
    rest) || product) >= 0, and the gap of the pruned ELBO is its mean. Of a single y it may have
    either sign.
    """
    toy = ToyDenoiser.random(seeded(0), num_tokens=NUM_TOKENS, length=LENGTH)
    joint = toy.log_joint().exp()
    table = table_of()
    signs = []
    for last in exit_sets(e):
        gap = exit_gap(table, last)
        rest = joint.reshape(GRID).sum(last, keepdim=True)
        conditional = joint.reshape(GRID) / rest
        product = torch.ones_like(conditional)
        for i in last:
            product = product * conditional.sum([k for k in last if k != i], keepdim=True)
        correlation = (conditional * (conditional / product).log()).sum(last)
        assert torch.allclose(conditional_mean(gap, joint, last), correlation, atol=1e-9)
        assert correlation.min() > 1e-4
        signs += [gap.min() < 0, gap.max() > 0]
    assert all(signs)
    bias = order_elbo(table, ALL) - pruned_elbo(table, e)
    assert torch.allclose(
        bias, torch.stack([exit_gap(table, last) for last in exit_sets(e)]).mean(0), atol=1e-9
    )
    assert float((joint * bias).sum()) > 0


def test_without_correlation_the_exit_is_free() -> None:
    table, _ = context_free()
    for last in itertools.combinations(range(5), 3):
        assert exit_gap(table, last).abs().max() < 1e-9


@pytest.mark.parametrize("noise", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("e", [2, 3])
def test_on_text_of_the_exit_call_itself_the_gap_is_never_positive(e: int, noise: float) -> None:
    """Exit tokens drawn side by side from the product: the mean gap is minus a KL, whatever the
    denoiser.
    """
    table = table_of(noise)
    for last in exit_sets(e):
        law = score(table, last, last).exp()
        assert conditional_mean(torch.ones(81).double(), law, last).allclose(
            torch.ones(()).double()
        )
        assert law.reshape(GRID).sum(last).allclose(torch.ones(()).double())
        assert conditional_mean(exit_gap(table, last), law, last).max() < 0


def test_an_inconsistent_denoiser_can_score_its_exit_higher_than_single_reveals() -> None:
    """Conditionals with one token missing made wrong, all others exact: text of the joint, and the
    mean gap is negative.
    """
    toy = ToyDenoiser.random(seeded(0), num_tokens=NUM_TOKENS, length=LENGTH)
    tilt = torch.zeros(2**LENGTH, LENGTH, NUM_TOKENS, dtype=torch.float64)
    for i in ALL:
        tilt[1 << i, i] = torch.tensor([3.0, 0.0, -3.0])
    joint = toy.log_joint().exp()
    table = conditional_logps(toy.log_weights, NUM_TOKENS, LENGTH, tilt)
    for last in exit_sets(2):
        assert float((joint * exit_gap(table, last)).sum()) < 0
        assert float((joint * exit_gap(table_of(), last)).sum()) > 0


def test_the_exit_view_scores_what_the_exit_call_drew() -> None:
    """decode() with an exit on the toy: the estimator's exit term is the behavior log-prob of those
    tokens, without noise.
    """
    toy = ToyDenoiser.random(seeded(3), num_tokens=NUM_TOKENS, length=LENGTH, noise=0.7)
    canvas = blank_canvas([[0, 0]] * 40, gen_length=LENGTH, denoiser=toy)
    rollout = decode(
        toy,
        canvas,
        block_length=4,
        steps=4,
        select="entropy",
        temperature=1.0,
        exit_at=0.5,
        generator=seeded(4),
    )
    assert rollout.exit_mask.sum(-1).tolist() == [2] * 40
    for seed in (1, 2):
        estimator = elbo(num_mc=3)
        logps = token_logps(
            toy, rollout, estimator, estimator.make_views(rollout, toy.mask_id, seeded(seed))
        )
        got = logps[rollout.exit_mask]
        want = rollout.behavior_logps[rollout.exit_mask]
        assert got.tolist() == pytest.approx(want.tolist(), abs=1e-6)
