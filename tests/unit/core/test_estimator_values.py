"""Estimators side by side on arbitrary tables of log p per masked set (L = 5), enumerated; and what
lowers the variance.

The any-order ELBO is the mean of the ELBO's, ESPO's,
BGPO's (the ELBO's draws one by one) and SPG's random masks; coupled masks are off by their scale of
1.5; the mean field and UniGRPO are something else.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from tests.exact import FormulaDenoiser, Outcomes, every_order, subsets, table_elbo, views_by_hand
from unmaskrl.core.estimators import (
    ESTIMATORS,
    Update,
    coupled,
    elbo,
    mean_field,
    sandwich,
    trajectory,
    unigrpo,
)
from unmaskrl.core.estimators.gauss import gauss_legendre
from unmaskrl.core.scoring import token_logps

L = 5
SEEDS = range(4)
TABLES = [FormulaDenoiser.table(seed) for seed in range(12)]


def values(
    denoiser: FormulaDenoiser, name: str, kwargs: dict, outcomes: Outcomes, monkeypatch, **patched
) -> Tensor:
    """The estimate at every outcome (N,); no advantages, so that SPG gives its lower bound."""
    estimator = ESTIMATORS[name](**kwargs)
    rollout = denoiser.rollout(len(outcomes.share))
    both = {"row": outcomes.share, "position": outcomes.keys} | patched
    views = views_by_hand(monkeypatch, name, estimator, rollout, denoiser.mask_id, **both)
    return token_logps(denoiser, rollout, estimator, views).sum(-1)


ANY_ORDER = [
    ("elbo", {"num_mc": 1}),
    ("elbo", {"num_mc": 5, "stratified": False}),
    ("elbo", {"num_mc": 2, "antithetic": True}),
    ("espo", {}),
    ("sandwich", {"mask": "random", "num_mc": 2}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "kwargs"), ANY_ORDER, ids=str)
def test_four_papers_estimate_one_number(name: str, kwargs: dict, seed: int, monkeypatch) -> None:
    denoiser = TABLES[seed]
    found = values(
        denoiser, name, kwargs, every_order(list(range(L)), L + (name == "espo"), L), monkeypatch
    )
    assert float(found.std()) > 0.1
    assert float(found.mean()) == pytest.approx(table_elbo(denoiser), abs=2e-6)


def coupled_mean(denoiser: FormulaDenoiser, normalise: bool, monkeypatch) -> float:
    """Over rho (a quadrature that is exact for its polynomial) and all 32 subsets."""
    total = 0.0
    parts = subsets(list(range(L)))
    keys = torch.ones(len(parts), 2 + L, dtype=torch.float64)
    for row, part in enumerate(parts):
        keys[row, [2 + i for i in part]] = 0.0
    for share, weight in zip(*(x.tolist() for x in gauss_legendre(4)), strict=True):
        rho = 0.2 + 0.6 * share
        outcomes = Outcomes(parts, torch.full((len(parts),), share, dtype=torch.float64), keys)
        found = values(denoiser, "coupled", {"normalise": normalise}, outcomes, monkeypatch)
        chance = torch.tensor(
            [rho ** len(p) * (1 - rho) ** (L - len(p)) for p in parts], dtype=torch.float64
        )
        total += weight * float(chance @ found)
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_coupled_masks_are_one_and_a_half_times_a_likelihood(seed: int, monkeypatch) -> None:
    denoiser = TABLES[seed]
    published, fixed = (
        coupled_mean(denoiser, normalise, monkeypatch) for normalise in (False, True)
    )
    field = float(denoiser.at(*range(L)).sum())
    # 2/3 of the fixed one are any-order terms at rates rho in (0.2, 0.8), 1/3 is the mean field
    rho, weights = gauss_legendre(4)
    any_rate = 0.0
    for i in range(L):
        for part in subsets([j for j in range(L) if j != i]):
            n = len(part)
            rates = 0.2 + 0.6 * rho
            chance = float((weights * rates**n * (1 - rates) ** (L - 1 - n)).sum())
            any_rate += chance * float(denoiser.at(i, *part)[i])
    assert fixed == pytest.approx((2 * any_rate + field) / 3, abs=2e-6)
    assert published == pytest.approx(1.5 * fixed, abs=2e-6)
    assert published < table_elbo(denoiser) - 0.5


def test_in_a_constant_model_every_estimator_shows_its_scale(monkeypatch) -> None:
    """-0.9 nats per token whatever is masked: 4.5 in all. Coupled says 6.75, UniGRPO its rate's
    share, all others 4.5.
    """
    denoiser = FormulaDenoiser(
        L, lambda masked: torch.full(masked.shape, -0.9, dtype=torch.float64)
    )
    assert coupled_mean(denoiser, False, monkeypatch) == pytest.approx(-6.75, abs=1e-5)
    assert coupled_mean(denoiser, True, monkeypatch) == pytest.approx(-4.5, abs=1e-5)
    rows = 2000
    rollout = denoiser.rollout(rows)
    for made in (
        elbo(),
        elbo(num_mc=2, antithetic=True),
        mean_field(),
        trajectory(),
        trajectory(num_segments=2),
        sandwich(block_length=2),
    ):
        views = made.make_views(rollout, denoiser.mask_id, seeded(1))
        assert torch.allclose(
            token_logps(denoiser, rollout, made, views).sum(-1),
            torch.tensor(-4.5, dtype=torch.float64),
        )
    for index, share in ((0, 0.5), (1, 0.75), (2, 1.0)):
        made = unigrpo(num_steps=1000)
        views = made.make_views(
            rollout, denoiser.mask_id, seeded(2), Update(index=index, total=3, seed=4)
        )
        found = token_logps(denoiser, rollout, made, views).sum(-1)
        assert abs(float(found.mean()) + 4.5 * share) < 4 * float(found.std()) / rows**0.5 + 0.01


def test_the_mean_field_is_no_bound_of_an_arbitrary_table() -> None:
    """It lies on either side of the ELBO: its bias is the model's, not a direction."""
    gaps = [float(d.at(*range(L)).sum()) - table_elbo(d) for d in TABLES]
    assert min(gaps) < -0.5 and max(gaps) > 0.5


def moments(denoiser: FormulaDenoiser, monkeypatch) -> tuple[Tensor, Tensor]:
    """Mean and variance of the one-view ELBO given each count n = 1..L, over all subsets."""
    found = values(
        denoiser, "elbo", {"num_mc": 1}, every_order(list(range(L)), L, L), monkeypatch
    ).view(L, -1)
    return found.mean(-1), found.var(-1, correction=0)


def two_view_variances(denoiser: FormulaDenoiser, monkeypatch) -> dict[str, float]:
    """Exact variances of two views: independent draws, stratified counts, an antithetic pair,
    ESPO's complements.
    """
    mean, var = moments(denoiser, monkeypatch)
    single = float(var.mean() + mean.var(correction=0))
    # stratified: one uniform u; counts 1 + floor(u L / 2) and 1 + floor((u + 1) L / 2); it changes
    # at multiples of 1/L
    u = (torch.arange(L) + 0.5) / L
    low = (u * L / 2).floor().long()
    high = ((u + 1) * L / 2).floor().long()
    stratified = ((mean[low] + mean[high]) / 2).var(correction=0) + (
        (var[low] + var[high]) / 4
    ).mean()
    result = {"independent": single / 2, "stratified": float(stratified)}
    for name, kwargs in (("elbo", {"num_mc": 2, "antithetic": True}), ("espo", {})):
        found = values(
            denoiser,
            name,
            kwargs,
            every_order(list(range(L)), L + (name == "espo"), L),
            monkeypatch,
        )
        result[name] = float(found.var(correction=0))
    return result


def mean_variances(
    denoisers: list[FormulaDenoiser], monkeypatch
) -> tuple[dict[str, float], dict[str, int]]:
    """Mean of the exact variances, and on how many tables each is below that of independent
    draws.
    """
    found = [two_view_variances(d, monkeypatch) for d in denoisers]
    mean = {k: math.fsum(v[k] for v in found) / len(found) for k in found[0]}
    return mean, {k: sum(v[k] < v["independent"] for v in found) for k in found[0]}


def test_stratified_and_antithetic_lower_the_variance_at_equal_views(monkeypatch) -> None:
    """Exact on 12 joints: by a quarter each, on nearly all of them. It is the trend of log p with
    the rate that they remove.
    """
    mean, lower = mean_variances([FormulaDenoiser.joint(seed) for seed in range(12)], monkeypatch)
    assert mean["stratified"] < 0.8 * mean["independent"]
    assert mean["elbo"] < 0.8 * mean["independent"]
    assert lower["stratified"] >= 10 and lower["elbo"] >= 10


def test_without_a_trend_there_is_little_to_remove(monkeypatch) -> None:
    """Tables whose entries are independent: a few percent on average, and more variance on some of
    them.
    """
    mean, lower = mean_variances(TABLES, monkeypatch)
    for name in ("stratified", "elbo"):
        assert 0.9 < mean[name] / mean["independent"] < 1
        assert 5 <= lower[name] < 12


@pytest.mark.parametrize("size", [3, 5, 7])
def test_espo_pays_for_its_empty_canvases(size: int, monkeypatch) -> None:
    """A constant log p of c nats: the ELBO's count weights have no variance, ESPO's have c**2 (f -
    1) / 2 (k = 0 and k = f).
    """
    denoiser = FormulaDenoiser(
        size, lambda masked: torch.full(masked.shape, -0.9, dtype=torch.float64)
    )
    share = (torch.arange(size + 1) + 0.5) / (size + 1)
    outcomes = Outcomes(
        [()] * (size + 1),
        share.double(),
        torch.rand(size + 1, 2 + size, generator=seeded()).double(),
    )
    found = values(denoiser, "espo", {}, outcomes, monkeypatch)
    assert float(found.mean()) == pytest.approx(-0.9 * size, abs=1e-5)
    assert float(found.var(correction=0)) == pytest.approx(0.81 * (size - 1) / 2, abs=1e-5)
    assert (
        float(values(denoiser, "elbo", {"num_mc": 2}, outcomes, monkeypatch).var(correction=0))
        < 1e-9
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_variances_are_the_exact_ones(seed: int, monkeypatch) -> None:
    denoiser = TABLES[seed]
    rows = 6000
    exact = two_view_variances(denoiser, monkeypatch)
    rollout = denoiser.rollout(rows)
    for name, made in (
        ("independent", elbo(num_mc=2, stratified=False)),
        ("stratified", elbo(num_mc=2)),
        ("elbo", elbo(num_mc=2, antithetic=True)),
        ("espo", ESTIMATORS["espo"]()),
    ):
        found = token_logps(
            denoiser, rollout, made, made.make_views(rollout, denoiser.mask_id, seeded(6))
        ).sum(-1)
        spread = float(((found - found.mean()) ** 2).std()) / rows**0.5
        assert abs(float(found.var()) - exact[name]) < 4 * spread


def test_coupled_refuses_rates_without_an_inverse() -> None:
    with pytest.raises(ValueError, match=r"need 0 < rho_low <= rho_high < 1, got 0\.0 and 0\.8"):
        coupled(rho_low=0.0)
