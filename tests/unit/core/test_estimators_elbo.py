"""Estimators of the any-order ELBO on the toy: antithetic pairs, ESPO's complements, quadrature;
and STP's published surrogate.

Means are taken over every order and every piece of the row uniform; the oracle sums over orders of
the tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import ROUNDING, chi_square_p, seeded
from tests.exact import (
    CASES,
    PROMPT,
    Case,
    FormulaDenoiser,
    any_order_elbo,
    every_order,
    hidden_log_p,
    subsets,
    table_elbo,
    views_by_hand,
)
from unmaskrl.core.estimators import ESTIMATORS, elbo, espo, gauss
from unmaskrl.core.estimators.gauss import gauss_legendre
from unmaskrl.core.scoring import token_logps

UNBIASED = [
    ("elbo", {"num_mc": 3}),
    ("elbo", {"num_mc": 2, "antithetic": True}),
    ("elbo", {"num_mc": 4, "antithetic": True}),
    ("espo", {}),
    ("espo", {"num_mc": 2}),
]


def expected(
    name: str, kwargs: dict, case: Case, monkeypatch, weights: Tensor | None = None
) -> Tensor:
    """The mean of the estimate over all outcomes."""
    size = len(case.candidates)
    outcomes = every_order(case.candidates, max(1, size + (name == "espo")))
    estimator = ESTIMATORS[name](hide_anchors=case.hide_anchors, **kwargs)
    rollout = case.rollout(len(outcomes.orders))
    toy = case.toy(weights)
    views = views_by_hand(
        monkeypatch,
        name,
        estimator,
        rollout,
        toy.mask_id,
        row=outcomes.share,
        position=outcomes.keys,
    )
    return token_logps(toy, rollout, estimator, views).sum(-1).mean()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("name", "kwargs"), UNBIASED, ids=str)
def test_value_and_gradient_are_unbiased_exactly(
    name: str, kwargs: dict, case: Case, monkeypatch
) -> None:
    weights = torch.randn(81, generator=seeded(32), dtype=torch.float64, requires_grad=True)
    got = expected(name, kwargs, case, monkeypatch, weights)
    want = any_order_elbo(case.toy(weights), case)
    assert got.item() == pytest.approx(want.item(), abs=2e-6)  # weights are stored in fp32
    (got_grad,), (want_grad,) = (torch.autograd.grad(value, weights) for value in (got, want))
    assert want_grad.abs().max() > 1e-3
    assert torch.allclose(got_grad, want_grad, atol=1e-6)


@pytest.mark.parametrize("name", ["inconsistent", "anchors", "hidden anchors", "eos", "exit"])
@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(
    ("estimator", "kwargs"), [("elbo", {"num_mc": 4, "antithetic": True}), ("espo", {"num_mc": 2})]
)
def test_real_random_numbers_agree_within_4_standard_errors(
    name: str, stratified: bool, estimator: str, kwargs: dict
) -> None:
    case = CASES[name]
    rows = 3000
    options = kwargs | ({"stratified": stratified} if estimator == "elbo" else {})
    made = ESTIMATORS[estimator](hide_anchors=case.hide_anchors, **options)
    rollout = case.rollout(rows)
    toy = case.toy()
    values = token_logps(toy, rollout, made, made.make_views(rollout, toy.mask_id, seeded(3))).sum(
        -1
    )
    error = float(values.std()) / rows**0.5
    assert error < 0.1
    assert abs(float(values.mean()) - any_order_elbo(toy, case).item()) < 4 * error


@pytest.mark.parametrize("name", ["free", "anchors", "hidden anchors", "eos", "exit"])
def test_an_antithetic_pair_scores_every_candidate_and_one_of_them_twice(name: str) -> None:
    case = CASES[name]
    rows = 2000
    made = elbo(num_mc=4, antithetic=True, hide_anchors=case.hide_anchors)
    views = made.make_views(case.rollout(rows), case.toy().mask_id, seeded(5))
    size = len(case.candidates)
    hidden = (views.ids[:, :4, PROMPT:] == case.toy().mask_id)[:, :, case.candidates].view(
        rows, 2, 2, size
    )
    assert (hidden.any(2).all(-1)).all()
    assert (hidden.all(2).sum(-1) == 1).all()
    counts = hidden.sum(-1)
    assert (counts.sum(-1) == size + 1).all()
    # a pair is n and size + 1 - n, n uniform: the counts of a pair that is picked at random, one of
    # its draws at random
    pick = torch.randint(2, (2, rows), generator=seeded(6))
    picked = counts[torch.arange(rows), pick[0], pick[1]]
    assert (
        chi_square_p(picked.bincount(minlength=size + 1)[1:], torch.full((size,), 1 / size)) > 1e-4
    )
    # the strata
    assert (counts[:, 0, 0].max() <= size // 4 + 1) and (counts[:, 1, 0].min() >= size // 4)
    weight = views.weight.view(rows, -1, PROMPT + 4)[:, :4, PROMPT:].amax(-1).view(rows, 2, 2)
    scored = weight > 0  # with hidden anchors a draw may hide nothing else
    assert torch.allclose(weight[scored], (size / (4 * counts))[scored].float())
    assert scored.all() != case.hide_anchors


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_visible_is_the_published_surrogate_and_no_elbo(case: Case, monkeypatch) -> None:
    """STP's code: n ~ U{1..c}, an n-subset of all c completion tokens but anchors hidden, log p of
    every action token.
    """
    outcomes = every_order(list(range(case.end)), case.end)
    rollout = case.rollout(len(outcomes.orders))
    toy = case.toy()
    made = elbo(num_mc=1, visible=True, hide_anchors=case.hide_anchors)
    views = views_by_hand(
        monkeypatch, "elbo", made, rollout, toy.mask_id, row=outcomes.share, position=outcomes.keys
    )
    got = token_logps(toy, rollout, made, views)[:, PROMPT:].mean(0)
    spared = set() if case.hide_anchors else set(case.anchors)
    for i in range(4):
        want = 0.0
        if i in case.actions:
            for subset in subsets(list(range(case.end)))[1:]:
                chance = 1 / (case.end * math.comb(case.end, len(subset)))
                want += chance * hidden_log_p(toy, case, set(subset) - spared, i)
        assert float(got[i]) == pytest.approx(want, abs=1e-9)
    if not case.exits:  # which get no exact view of their own
        assert abs(float(got.sum()) - any_order_elbo(toy, case).item()) > 0.05


@pytest.mark.parametrize("length", [5, 200])
def test_visible_tokens_are_copied_so_that_about_half_of_the_log_probability_is_lost(
    length: int,
) -> None:
    """0.7 nats per hidden token, 0 per visible one: (c + 1) / 2 tokens are hidden on average, and
    weigh 1 instead of c / n.
    """
    denoiser = FormulaDenoiser(length, lambda masked: torch.where(masked, -0.7, -1e-12).double())
    rows = 400
    rollout = denoiser.rollout(rows)

    def values(**options) -> Tensor:
        made = elbo(num_mc=4, **options)
        return token_logps(
            denoiser, rollout, made, made.make_views(rollout, denoiser.mask_id, seeded(1))
        ).sum(-1)

    assert torch.allclose(values(), torch.full((rows,), -0.7 * length, dtype=torch.float64))
    published = values(visible=True)
    error = float(published.std()) / rows**0.5
    assert (
        abs(float(published.mean()) + 0.7 * (length + 1) / 2) < 4 * error and error < 0.01 * length
    )


def test_visible_scores_what_its_canvases_show(monkeypatch) -> None:
    """A joint gives a visible token log p = 0; a network does not, and neither does this table."""
    denoiser = FormulaDenoiser.table(3)
    outcomes = every_order(list(range(5)), 5, length=5)
    rollout = denoiser.rollout(len(outcomes.orders))
    made = elbo(num_mc=1, visible=True)
    views = views_by_hand(
        monkeypatch,
        "elbo",
        made,
        rollout,
        denoiser.mask_id,
        row=outcomes.share,
        position=outcomes.keys,
    )
    got = token_logps(denoiser, rollout, made, views)[:, PROMPT:].mean(0)
    want = sum(denoiser.at(*s) / (5 * math.comb(5, len(s))) for s in subsets(list(range(5)))[1:])
    assert torch.allclose(got, want, atol=1e-7)


def test_visible_averages_its_draws(monkeypatch) -> None:
    case = CASES["anchors"]
    toy = case.toy()
    made = elbo(num_mc=2, visible=True)
    keys = every_order([0, 1, 2, 3], 1).keys[:1]
    share = torch.tensor([0.1], dtype=torch.float64)  # strata 1..2 and 3..4: one token, then three
    views = views_by_hand(
        monkeypatch, "elbo", made, case.rollout(), toy.mask_id, row=share, position=keys
    )
    got = token_logps(toy, case.rollout(), made, views)[0, PROMPT:]
    for i in case.actions:  # offset 0 is an anchor, and spared
        want = (hidden_log_p(toy, case, set(), i) + hidden_log_p(toy, case, {1, 2}, i)) / 2
        assert float(got[i]) == pytest.approx(want, abs=1e-9)
    assert float(got[0]) == 0


@pytest.mark.parametrize(
    "name", ["inconsistent", "anchors", "hidden anchors", "eos", "exit, anchors"]
)
def test_espo_is_its_formula_at_every_outcome(name: str, monkeypatch) -> None:
    """Also at k = 0 and k = f, where one of the two canvases hides nothing and counts nothing."""
    case = CASES[name]
    f = len(case.candidates)
    outcomes = every_order(case.candidates, f + 1)
    rollout = case.rollout(len(outcomes.orders))
    toy = case.toy()
    made = espo(hide_anchors=case.hide_anchors)
    views = views_by_hand(
        monkeypatch, "espo", made, rollout, toy.mask_id, row=outcomes.share, position=outcomes.keys
    )
    got = token_logps(toy, rollout, made, views).sum(-1)
    exits = set(case.exits)
    exact = sum(hidden_log_p(toy, case, exits, i) for i in exits)
    for row, order in enumerate(outcomes.orders):
        k = row // math.factorial(f) // 2  # of a pair, the smaller count
        want = exact
        for part in (order[:k], order[k:]):
            scored = [i for i in part if i in case.rest]
            if part:
                want += (
                    (f + 1)
                    / (2 * len(part))
                    * sum(hidden_log_p(toy, case, set(part) | exits, i) for i in scored)
                )
        assert float(got[row]) == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5, 8])
def test_quadrature_is_exact_up_to_its_degree(num_nodes: int) -> None:
    nodes, weights = gauss_legendre(num_nodes)
    errors = [
        abs(float((weights * nodes**d).sum()) - 1 / (d + 1)) for d in range(2 * num_nodes + 1)
    ]
    assert max(errors[:-1]) < ROUNDING * torch.finfo(torch.float64).eps  # of sums up to 1
    # the next power is missed by the error term of Gauss-Legendre on [0, 1]
    n = num_nodes
    missed = math.factorial(n) ** 4 / ((2 * n + 1) * math.factorial(2 * n) ** 2)
    assert errors[-1] == pytest.approx(missed, rel=1e-3)


@pytest.mark.parametrize("weight", ["rate", "count"])
@pytest.mark.parametrize("name", ["inconsistent", "anchors", "hidden anchors", "exit, anchors"])
def test_gauss_is_its_formula_at_every_outcome(name: str, weight: str, monkeypatch) -> None:
    case = CASES[name]
    f = len(case.candidates)
    exits = set(case.exits)
    outcomes = every_order(case.candidates, 1)
    rollout = case.rollout(len(outcomes.orders))
    toy = case.toy()
    made = gauss(weight=weight, hide_anchors=case.hide_anchors)
    views = views_by_hand(monkeypatch, "gauss", made, rollout, toy.mask_id, position=outcomes.keys)
    got = token_logps(toy, rollout, made, views).sum(-1)
    rates = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))
    weights = (5 / 18, 8 / 18, 5 / 18)
    for row, order in enumerate(outcomes.orders):
        want = sum(hidden_log_p(toy, case, exits, i) for i in exits)
        for t, w in zip(rates, weights, strict=True):
            n = max(1, round(t * f) if weight == "count" else math.floor(t * f))
            factor = w * f / n if weight == "count" else w / t
            part = set(order[:n])
            want += factor * sum(
                hidden_log_p(toy, case, part | exits, i) for i in part if i in case.rest
            )
        assert float(got[row]) == pytest.approx(want, abs=5e-6)


def by_rate(length: int, curve) -> FormulaDenoiser:
    """Every log p is ``curve`` of the masked share."""
    return FormulaDenoiser(
        length, lambda masked: curve(masked.double().mean(-1, keepdim=True)).expand(masked.shape)
    )


def gauss_value(denoiser: FormulaDenoiser, **options) -> float:
    made = gauss(**options)
    rollout = denoiser.rollout()
    return float(
        token_logps(
            denoiser, rollout, made, made.make_views(rollout, denoiser.mask_id, seeded(1))
        ).sum()
    )


@pytest.mark.parametrize("weight", ["rate", "count"])
@pytest.mark.parametrize("num_nodes", [2, 3])
def test_gauss_integrates_polynomials_in_the_rate(num_nodes: int, weight: str) -> None:
    """-log p = (d + 1) t**d per token integrates to 1 nat; whole tokens move t by at most 1 / f,
    and w / t by that over t.
    """
    length = 20000
    for degree in range(2 * num_nodes):
        value = gauss_value(
            by_rate(length, lambda t, d=degree: -(d + 1) * t**d), num_nodes=num_nodes, weight=weight
        )
        assert value / length == pytest.approx(-1, abs=10 * (degree + 1) / length)
    # the next degree is beyond it: 2.8% (2 nodes) or 0.25% (3 nodes) are missed
    degree = 2 * num_nodes
    value = gauss_value(
        by_rate(length, lambda t: -(degree + 1) * t**degree), num_nodes=num_nodes, weight=weight
    )
    assert 0.002 < abs(value / length + 1) < 0.03


def test_in_a_constant_model_counts_are_exact_and_rates_converge_with_length() -> None:
    errors = []
    for length in (5, 50, 500, 5000):
        denoiser = by_rate(length, lambda t: torch.full_like(t, -0.7))
        assert gauss_value(denoiser, weight="count") == pytest.approx(-0.7 * length, rel=1e-6)
        errors.append(abs(gauss_value(denoiser) / (-0.7 * length) - 1))
    assert errors[0] > 0.05
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3


def test_more_nodes_come_nearer_on_a_smooth_curve() -> None:
    length = 5000
    denoiser = by_rate(length, lambda t: -0.1 - torch.exp(3 * t) / 10)
    elbo_value = float(denoiser.logp(torch.ones(length, length).tril().bool())[:, 0].sum())
    errors = [abs(gauss_value(denoiser, num_nodes=n) / elbo_value - 1) for n in (1, 2, 3)]
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


def test_rounded_rates_are_biased_for_short_completions_and_counts_much_less(monkeypatch) -> None:
    """On 20 random tables at L=5; at L=256 on a smooth curve the rate's error
    is below a percent.
    """
    outcomes = every_order(list(range(5)), 1, length=5)
    bias = {"rate": [], "count": []}
    for seed in range(20):
        denoiser = FormulaDenoiser.table(seed)
        truth = table_elbo(denoiser)
        rollout = denoiser.rollout(120)
        for weight, found in bias.items():
            made = gauss(weight=weight)
            views = views_by_hand(
                monkeypatch, "gauss", made, rollout, denoiser.mask_id, position=outcomes.keys
            )
            found.append(float(token_logps(denoiser, rollout, made, views).sum(-1).mean()) - truth)
    rate, count = (torch.tensor(bias[weight]) for weight in ("rate", "count"))
    # 2.46, 1.78 and 1.25 sum to 5.50 token weights where there are 5 tokens
    assert float(rate.mean()) < -0.3
    assert abs(float(count.mean())) < 0.3 * abs(float(rate.mean()))
    long = by_rate(256, lambda t: -0.1 - 1.5 * t**1.5)
    truth = float(long.logp(torch.ones(256, 256).tril().bool())[:, 0].sum())
    assert abs(gauss_value(long, num_nodes=3) / truth - 1) < 0.01
