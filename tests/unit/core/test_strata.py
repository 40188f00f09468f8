"""Stratified counts: one uniform per stratum. Exact variances, by every outcome of the uniforms and
of the orders.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.conftest import finished_rollout, seeded
from tests.exact import PROMPT, FormulaDenoiser, views_by_hand
from unmaskrl.core.estimators import ESTIMATORS
from unmaskrl.core.scoring import token_logps

SETTINGS = [
    ("elbo", {}, 1),
    ("elbo", {"antithetic": True}, 2),
    ("espo", {}, 1),
    ("sandwich", {"mask": "random"}, 1),
]


def moments(
    name: str, options: dict, per_draw: int, draws: int, denoiser, monkeypatch
) -> tuple[float, float]:
    """Mean and variance of the estimate: every piece of each draw's uniform times every order, for
    all draws together.
    """
    length = denoiser.length
    one = [(u, order) for u in pieces(name, length) for order in orders(length)]
    both = list(itertools.product(one, repeat=draws))
    shares = torch.tensor([[u for u, _ in row] for row in both], dtype=torch.float64)
    keys = torch.full((len(both), draws, PROMPT + length), 0.5, dtype=torch.float64)
    ranks = torch.tensor([[[o.index(i) for i in range(length)] for _, o in row] for row in both])
    keys[:, :, PROMPT:] = (ranks + 1) / (length + 2)
    estimator = ESTIMATORS[name](num_mc=draws * per_draw, **options)
    views = views_by_hand(
        monkeypatch,
        name,
        estimator,
        rollout := denoiser.rollout(len(both)),
        denoiser.mask_id,
        row=lambda rollout, seed, *key: shares[:, key[1] if len(key) > 1 else 0],
        position=lambda rollout, seed, *key, **_: keys[:, key[-1]],
    )
    values = token_logps(denoiser, rollout, estimator, views).sum(-1).double()
    return float(values.mean()), float(values.var(unbiased=False))


def pieces(name: str, length: int) -> list[float]:
    """Middles of the pieces of a stratum's uniform on which the count is constant, whatever the
    number of strata.
    """
    number = length + (name == "espo")
    return [(j + 0.5) / number for j in range(number)]


def orders(length: int) -> list[tuple[int, ...]]:
    """Every order."""
    return list(itertools.permutations(range(length)))


@pytest.mark.parametrize(("name", "options", "per_draw"), SETTINGS, ids=str)
@pytest.mark.parametrize("draws", [2, 3])
def test_strata_keep_the_mean_and_are_never_noisier_than_independent_draws(
    name: str, options: dict, per_draw: int, draws: int, monkeypatch
) -> None:
    """Var of K strata <= Var of one draw / K: the theorem of stratified sampling, exact to the
    rounding of fp32 weights.
    """
    shares = []
    denoisers = [FormulaDenoiser.table(seed, 3) for seed in range(3)]
    denoisers += [
        FormulaDenoiser.joint(seed, 3, noise) for seed in range(2) for noise in (0.0, 0.7)
    ]
    for denoiser in denoisers:
        want, single = moments(name, options, per_draw, 1, denoiser, monkeypatch)
        got, variance = moments(name, options, per_draw, draws, denoiser, monkeypatch)
        assert got == pytest.approx(want, rel=1e-5)
        assert variance <= single / draws * (1 + 1e-5) + 1e-9
        shares.append(variance / (single / draws))
    assert min(shares) < 0.98


@pytest.mark.parametrize(("name", "options", "per_draw"), [SETTINGS[0], SETTINGS[3]], ids=str)
def test_a_period_in_the_count_costs_nothing(
    name: str, options: dict, per_draw: int, monkeypatch
) -> None:
    """log p by the parity of |M|, f = 4, K = 2: counts 1 and 3, or 2 and 4, came together with one
    uniform for both strata.

    A draw's total is 4 log p, so its variance is (4 d / 2)^2 with d = 1.8; of two it is half of
    that, 6.48, and not all of it.
    """
    low = -2.0
    d = 1.8
    denoiser = FormulaDenoiser(
        4,
        lambda masked: (low + d * (masked.sum(-1, keepdim=True) % 2)).double().expand(masked.shape),
    )
    # only |M| matters
    monkeypatch.setattr("tests.unit.core.test_strata.orders", lambda length: [tuple(range(length))])
    mean, variance = moments(name, options, per_draw, 2, denoiser, monkeypatch)
    assert mean == pytest.approx(4 * (low + d / 2), rel=1e-5)
    assert variance == pytest.approx((4 * d / 2) ** 2 / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("elbo", {}), ("espo", {}), ("sandwich", {"mask": "random"})], ids=str
)
def test_real_uniforms_of_the_strata_are_uncorrelated(
    name: str, options: dict, monkeypatch
) -> None:
    """The generator's own uniforms: the keys of the strata differ, and so do the draws; counts stay
    in their strata.
    """
    rows = 4000
    length = 12
    rollout = finished_rollout([[1] * length] * rows, [list(range(1, length + 1))] * rows, eos_id=9)
    estimator = ESTIMATORS[name](num_mc=3, **options)
    views = estimator.make_views(rollout, 8, seeded(4))
    step = 2 if name == "espo" else 1  # a pair of canvases per draw
    counts = (views.ids[:, ::step, PROMPT:] == 8).sum(-1).double()
    size = (length + 1) / 2 if name == "espo" else length  # of a pair, the smaller count
    for k in range(3):
        assert math.floor(k * size / 3) <= counts[:, k].min()
        assert counts[:, k].max() <= math.ceil((k + 1) * size / 3) + 1
        assert len(counts[:, k].unique()) > 1
    correlation = torch.corrcoef(counts.T) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / rows**0.5
