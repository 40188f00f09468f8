"""Estimators on the toy, where everything is enumerated: the ELBO's value, unbiasedness, gradient
and variance; mean field.

The oracle sums over orders of the tokens. The estimator is never sampled for exact claims: its two
sources of chance (a uniform per row for the count, one per position for the subset) are set by
hand, so that each row of one batch is one of its possible outcomes.
"""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.conftest import chi_square_p, finished_rollout, seeded
from tests.exact import CASES, PROMPT, Case, any_order_elbo, log_p
from unmaskrl.core.estimators import elbo, mean_field
from unmaskrl.core.scoring import token_logps, view_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout, Views

ELBO_MODULE = importlib.import_module("unmaskrl.core.estimators.elbo")


def outcomes(case: Case) -> list[tuple[int, tuple[int, ...], float]]:
    """Every (count n, subset M, probability): n uniform on 1..|C|, M uniform among the
    n-subsets.
    """
    size = len(case.candidates)
    if size == 0:
        return [(0, (), 1.0)]
    return [
        (n, subset, 1 / (size * math.comb(size, n)))
        for n in range(1, size + 1)
        for subset in itertools.combinations(case.candidates, n)
    ]


def all_views(case: Case, monkeypatch) -> tuple[Rollout, Views, Tensor]:
    """Row b is the estimator with num_mc=1 made to take outcome b; and the outcomes'
    probabilities.
    """
    cases = outcomes(case)
    rollout = case.rollout(len(cases))
    share = torch.tensor(
        [(n - 0.5) / max(1, len(case.candidates)) for n, _, _ in cases], dtype=torch.float64
    )
    keys = torch.full(rollout.ids.shape, 0.5, dtype=torch.float64)
    for row, (_, subset, _) in enumerate(cases):
        keys[row, [PROMPT + c for c in subset]] = 0.1
    monkeypatch.setattr(ELBO_MODULE, "row_uniform", lambda *_: share)
    monkeypatch.setattr(ELBO_MODULE, "position_uniform", lambda *_: keys)
    views = elbo(num_mc=1, hide_anchors=case.hide_anchors).make_views(
        rollout, case.toy().mask_id, seeded()
    )
    monkeypatch.undo()
    return (
        rollout,
        exact_weights(views, case, cases),
        torch.tensor([p for _, _, p in cases], dtype=torch.float64),
    )


def exact_weights(views: Views, case: Case, cases) -> Views:
    """The weights, stored in fp32, as the fractions |C| / n that they stand for."""
    exact = torch.zeros(views.weight.shape, dtype=torch.float64)
    for row, (n, subset, _) in enumerate(cases):
        exact[row, 0, [PROMPT + c for c in subset if c in case.rest]] = len(case.candidates) / max(
            n, 1
        )
        if case.exits:
            exact[row, 1, [PROMPT + c for c in case.exits]] = 1.0
    assert torch.allclose(views.weight.double(), exact, atol=1e-6)
    return Views(ids=views.ids, weight=exact)


@pytest.mark.parametrize("name", CASES)
def test_elbo_is_unbiased_exactly(name: str, monkeypatch) -> None:
    case = CASES[name]
    rollout, views, probs = all_views(case, monkeypatch)
    toy = case.toy()
    values = token_logps(toy, rollout, elbo(num_mc=1), views).sum(-1)
    assert float(probs.sum()) == pytest.approx(1.0)
    assert float((probs * values).sum()) == pytest.approx(
        any_order_elbo(toy, case).item(), abs=1e-9
    )


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_unbiased_exactly(name: str, monkeypatch) -> None:
    case = CASES[name]
    rollout, views, probs = all_views(case, monkeypatch)
    weights = torch.randn(81, generator=seeded(32), dtype=torch.float64, requires_grad=True)
    toy = case.toy(weights)
    expected_value = (probs * token_logps(toy, rollout, elbo(num_mc=1), views).sum(-1)).sum()
    (got,) = torch.autograd.grad(expected_value, weights)
    (want,) = torch.autograd.grad(any_order_elbo(toy, case), weights)
    assert want.abs().max() > 1e-3
    assert torch.allclose(got, want, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_views_show_exactly_what_the_formula_conditions_on(name: str, monkeypatch) -> None:
    case = CASES[name]
    _, views, _ = all_views(case, monkeypatch)
    mask = case.toy().mask_id
    tail = set(range(case.end, 4))
    for row, (_, subset, _) in enumerate(outcomes(case)):
        hidden = {c for c in range(4) if int(views.ids[row, 0, PROMPT + c]) == mask}
        assert hidden == set(subset) | set(case.exits) | tail
        if case.exits:
            assert {c for c in range(4) if int(views.ids[row, 1, PROMPT + c]) == mask} == set(
                case.exits
            ) | tail
    assert views.ids.shape[1] == 1 + bool(case.exits)


def test_for_a_joint_the_any_order_elbo_without_pruning_is_the_log_likelihood() -> None:
    case = CASES["free"]
    toy = case.toy()
    exact = toy.log_joint()[toy.completions.tolist().index(list(case.ids))]
    assert any_order_elbo(toy, case).item() == pytest.approx(float(exact), abs=1e-12)
    given = CASES["two anchors"]
    keep = (toy.completions[:, 1] == 2) & (toy.completions[:, 2] == 1)
    marginal = toy.log_joint()[keep].logsumexp(-1)
    assert any_order_elbo(toy, given).item() == pytest.approx(float(exact - marginal), abs=1e-12)


def estimates(case: Case, rows: int, *, seed: int, **options) -> Tensor:
    """One independent estimate per row."""
    estimator = elbo(hide_anchors=case.hide_anchors, **options)
    rollout = case.rollout(rows)
    toy = case.toy()
    views = estimator.make_views(rollout, toy.mask_id, seeded(seed))
    assert views.ids.shape[1] == estimator.num_views(4, max(case.steps), bool(case.exits))
    return token_logps(toy, rollout, estimator, views).sum(-1)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(
    "name", ["inconsistent", "anchors", "hidden anchors", "eos", "exit", "exit, hidden anchors"]
)
def test_sampled_estimates_agree_within_4_standard_errors(name: str, stratified: bool) -> None:
    case = CASES[name]
    values = estimates(case, 2500, seed=3, num_mc=3, stratified=stratified)
    error = values.std() / len(values) ** 0.5
    assert float(error) < 0.1
    assert abs(float(values.mean()) - any_order_elbo(case.toy(), case).item()) < 4 * float(error)


@pytest.mark.parametrize("num_mc", [2, 3, 4])
def test_stratified_counts_lower_the_variance(num_mc: int) -> None:
    case = CASES["inconsistent"]
    independent = estimates(case, 2500, seed=4, num_mc=num_mc, stratified=False).var()
    stratified = estimates(case, 2500, seed=5, num_mc=num_mc, stratified=True).var()
    assert float(stratified) < 0.8 * float(independent)
    # Independent draws are just averaged: num_mc times less than one draw.
    single = estimates(case, 2500, seed=6, num_mc=1).var()
    assert float(independent) == pytest.approx(float(single) / num_mc, rel=0.15)


@pytest.mark.parametrize("stratified", [True, False])
def test_counts_and_subsets_are_uniform(stratified: bool) -> None:
    """Counts over all draws, and subsets given the count, from the real random numbers; row ids and
    draws both vary.
    """
    rows = 3000
    case = CASES["free"]
    views = elbo(num_mc=3, stratified=stratified).make_views(case.rollout(rows), 3, seeded(9))
    hidden = (views.ids[:, :, PROMPT:] == 3).long()
    counts = hidden.sum(-1)
    # Strata share one uniform per row, so that counts of a row depend on each other: test one draw
    # of each row.
    pick = torch.arange(rows) % 3
    one = counts[torch.arange(rows), pick]
    assert chi_square_p(one.bincount(minlength=5)[1:], torch.full((4,), 0.25)) > 1e-4
    code = (hidden * torch.tensor([1, 2, 4, 8])).sum(-1)[torch.arange(rows), pick]
    for n in (1, 2, 3):
        codes = [c for c in range(16) if c.bit_count() == n]
        found = torch.tensor([int((code == c).sum()) for c in codes])
        assert chi_square_p(found, torch.full((len(codes),), 1 / len(codes))) > 1e-4
    if stratified:  # each third of 1..4 holds one count
        assert (
            (counts[:, 0] <= 2) & (counts[:, 1] >= 2) & (counts[:, 1] <= 3) & (counts[:, 2] >= 3)
        ).all()
    # Draws of one row are independent subsets, not one subset grown.
    pairs = code[counts[torch.arange(rows), pick] == 2]
    assert len(set(pairs.tolist())) == 6
    assert not torch.equal(hidden[:, 0], torch.minimum(hidden[:, 0], hidden[:, 2]))


def test_weights_do_not_depend_on_num_mc_in_expectation() -> None:
    """E[sum of weights per token] = 1: every action token is scored once on average."""
    case = CASES["anchors"]
    for stratified in (True, False):
        views = elbo(num_mc=3, stratified=stratified).make_views(case.rollout(2500), 3, seeded(2))
        total = views.weight.sum(1)[:, PROMPT:]
        error = total.std(0) / 2500**0.5
        assert (total[:, 0] == 0).all()  # the anchor
        assert ((total.mean(0) - 1).abs() < 4 * error)[1:].all()


@pytest.mark.parametrize("stratified", [True, False])
def test_the_largest_uniform_masks_all_candidates_and_the_smallest_one(
    stratified: bool, monkeypatch
) -> None:
    """(u + 2) / 3 rounds up to 1 there: the count must not exceed the candidates."""
    case = CASES["free"]
    for uniform, counts in (
        (1 - 2.0**-53, [2, 3, 4] if stratified else [4] * 3),
        (2.0**-53, [1, 2, 3] if stratified else [1] * 3),
    ):
        share = torch.tensor([uniform], dtype=torch.float64)
        monkeypatch.setattr(ELBO_MODULE, "row_uniform", lambda *_, u=share: u)
        views = elbo(num_mc=3, stratified=stratified).make_views(case.rollout(), 3, seeded())
        assert (views.ids == 3).sum(-1).tolist() == [counts]
        assert views.weight.amax(-1)[0].tolist() == pytest.approx([4 / (n * 3) for n in counts])


@pytest.mark.parametrize("anchors", [(), (3,), (1, 4), (0, 2, 3)])
def test_variance_is_the_closed_form_for_context_free_losses(
    anchors: tuple[int, ...], monkeypatch
) -> None:
    """docs/theory.md 2.1: Var X_F = g(f) Q_F, g(f) = f (H_f - 1) / (f - 1), and fixing tokens
    never raises it.
    """
    logits = torch.randn(5, 2, generator=seeded(41), dtype=torch.float64) * 1.5
    joint = torch.zeros(1, dtype=torch.float64)
    for row in logits:
        joint = (joint[:, None] + row).flatten()
    toy = ToyDenoiser(joint, num_tokens=2, length=5)
    ids = (0, 1, 1, 0, 1)

    def variance(given: tuple[int, ...]) -> tuple[float, float]:
        free = [c for c in range(5) if c not in given]
        subsets = [(n, s) for n in range(1, len(free) + 1) for s in itertools.combinations(free, n)]
        probs = torch.tensor(
            [1 / (len(free) * math.comb(len(free), n)) for n, _ in subsets], dtype=torch.float64
        )
        steps = [0 if c in given else 1 + c for c in range(5)]
        rollout = finished_rollout([ids] * len(subsets), [steps] * len(subsets), eos_id=toy.eos_id)
        share = torch.tensor([(n - 0.5) / len(free) for n, _ in subsets], dtype=torch.float64)
        keys = torch.full(rollout.ids.shape, 0.5, dtype=torch.float64)
        for row, (_, subset) in enumerate(subsets):
            keys[row, [PROMPT + c for c in subset]] = 0.1
        monkeypatch.setattr(ELBO_MODULE, "row_uniform", lambda *_: share)
        monkeypatch.setattr(ELBO_MODULE, "position_uniform", lambda *_: keys)
        estimator = elbo(num_mc=1)
        views = estimator.make_views(rollout, toy.mask_id, seeded())
        monkeypatch.undo()
        values = (view_logps(toy, rollout, views)[:, 0] * (views.weight[:, 0] > 0)).sum(-1)
        values = values * torch.tensor([len(free) / n for n, _ in subsets], dtype=torch.float64)
        mean = (probs * values).sum()
        cost = -logits.log_softmax(-1)[free, [ids[c] for c in free]]
        f = len(free)
        g = f * (sum(1 / k for k in range(1, f + 1)) - 1) / (f - 1)
        return float((probs * (values - mean) ** 2).sum()), float(
            g * ((cost - cost.mean()) ** 2).sum()
        )

    got, closed_form = variance(anchors)
    assert got == pytest.approx(closed_form, abs=1e-9)
    assert got <= variance(())[0] + 1e-12


@pytest.mark.parametrize(
    "name", ["free", "anchors", "hidden anchors", "eos", "eos, anchors around it", "exit, anchors"]
)
def test_mean_field_is_one_fully_masked_pass(name: str) -> None:
    case = CASES[name]
    toy = case.toy()
    estimator = mean_field(p_mask_prompt=0.0, hide_anchors=case.hide_anchors)
    rollout = case.rollout()
    views = estimator.make_views(rollout, toy.mask_id, seeded())
    got = token_logps(toy, rollout, estimator, views)[0, PROMPT:]
    visible = set() if case.hide_anchors else set(case.anchors)
    for c in range(4):
        want = log_p(toy, case, visible, c).item() if c in case.rest + case.exits else 0.0
        assert float(got[c]) == pytest.approx(want, abs=1e-12)
    assert views.ids.shape[1] == estimator.num_views(4, max(case.steps), bool(case.exits)) == 1
    assert (views.ids[0, 0, :PROMPT] == rollout.ids[0, :PROMPT]).all()


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_mean_field_drops_prompt_tokens_at_the_stated_rate(rate: float) -> None:
    rows = 400
    prompt = 20
    rollout = finished_rollout(
        [(0, 1, 1)] * rows, [(0, 1, 2)] * rows, eos_id=9, prompt=prompt, left_pad=2
    )
    ids = mean_field(p_mask_prompt=rate).make_views(rollout, 3, seeded(4)).ids[:, 0]
    dropped = (ids[:, 2 : 2 + prompt] == 3).double()
    spread = math.sqrt(rate * (1 - rate))
    assert abs(float(dropped.mean()) - rate) < 4 * spread / math.sqrt(rows * prompt)
    # no column stands out
    assert ((dropped.mean(0) - rate).abs() < 5 * spread / math.sqrt(rows)).all()
    assert (ids[:, :2] == 0).all()  # pads stay
    assert (ids[:, 2 + prompt :] == torch.tensor([0, 3, 3])).all()


def test_mean_field_masks_the_prompt_by_default_as_d1_does() -> None:
    rollout = finished_rollout([(0, 1)] * 200, [(1, 2)] * 200, eos_id=9, prompt=50)
    dropped = (mean_field().make_views(rollout, 3, seeded(4)).ids[:, 0, :50] == 3).double().mean()
    assert abs(float(dropped) - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 10000)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: elbo(num_mc=0), "num_mc must be at least 1, got 0"),
        (lambda: mean_field(p_mask_prompt=1.0), r"p_mask_prompt must be in \[0, 1\), got 1.0"),
        (lambda: mean_field(p_mask_prompt=-0.1), "got -0.1"),
    ],
)
def test_bad_settings_are_refused(factory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory()
