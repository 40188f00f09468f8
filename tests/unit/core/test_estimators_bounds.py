"""Coupled masks, UniGRPO's schedule and SPG's bounds on the toy: each against its formula, outcome
by outcome.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.conftest import chi_square_p, finished_rollout, seeded
from tests.exact import (
    CASES,
    PROMPT,
    Case,
    any_order_elbo,
    every_order,
    hidden_log_p,
    log_p,
    subsets,
    views_by_hand,
)
from unmaskrl.core.estimators import Update, coupled, sandwich, unigrpo
from unmaskrl.core.estimators.gauss import gauss_legendre
from unmaskrl.core.scoring import token_logps, view_logps
from unmaskrl.core.types import Views

SOME = [
    "inconsistent",
    "anchors",
    "hidden anchors",
    "eos",
    "eos, anchors around it",
    "exit, anchors",
    "exit, hidden anchors",
]
ON_SOME = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)


def coupled_outcomes(
    case: Case, share: float, normalise: bool, monkeypatch
) -> tuple[Tensor, Tensor, float]:
    """Token values (N, 4) of every subset of the maskable tokens at one rho, and the subsets'
    probabilities.
    """
    parts = subsets(case.maskable)
    rho = 0.2 + 0.6 * share
    keys = torch.full((len(parts), PROMPT + 4), 1.0, dtype=torch.float64)
    for row, part in enumerate(parts):
        keys[row, [PROMPT + i for i in part]] = 0.0
    probs = [rho ** len(p) * (1 - rho) ** (len(case.maskable) - len(p)) for p in parts]
    rollout = case.rollout(len(parts))
    toy = case.toy()
    made = coupled(normalise=normalise, hide_anchors=case.hide_anchors)
    rows = torch.full((len(parts),), share, dtype=torch.float64)
    views = views_by_hand(
        monkeypatch, "coupled", made, rollout, toy.mask_id, row=rows, position=keys
    )
    return (
        token_logps(toy, rollout, made, views)[:, PROMPT:],
        torch.tensor(probs, dtype=torch.float64),
        rho,
    )


@ON_SOME
@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_coupled_is_its_formula_at_every_outcome(case: Case, share: float, monkeypatch) -> None:
    values, _, rho = coupled_outcomes(case, share, False, monkeypatch)
    toy = case.toy()
    everything = set(case.maskable)
    for row, part in enumerate(subsets(case.maskable)):
        for i in range(4):
            want = 0.0
            if i in case.actions:
                inside = i in part
                hidden, rate = (set(part), rho) if inside else (everything - set(part), 1 - rho)
                want = (
                    hidden_log_p(toy, case, everything, i)
                    + hidden_log_p(toy, case, hidden, i) / rate
                ) / 2
            assert float(values[row, i]) == pytest.approx(want, abs=2e-6)


@ON_SOME
def test_coupled_is_three_halves_of_a_mean_over_three_terms(case: Case, monkeypatch) -> None:
    """E l_i = 1/2 (mean field + 2 E_rho[log p_i | others hidden with rho]): weights of 1.5,
    exactly, for any rho ~ 1 - rho.
    """
    # exact: the mean is a polynomial in rho of degree 3 at most
    shares, probs_of_share = gauss_legendre(4)
    published = torch.zeros(4, dtype=torch.float64)
    fixed = torch.zeros(4, dtype=torch.float64)
    toy = case.toy()
    want = torch.zeros(4, dtype=torch.float64)
    for share, chance in zip(shares.tolist(), probs_of_share.tolist(), strict=True):
        values, probs, rho = coupled_outcomes(case, share, False, monkeypatch)
        published += chance * (probs @ values)
        fixed += chance * (probs @ coupled_outcomes(case, share, True, monkeypatch)[0])
        for i in case.actions:
            others = [j for j in case.maskable if j != i]
            for part in subsets(others):
                p = rho ** len(part) * (1 - rho) ** (len(others) - len(part))
                want[i] += chance * p * hidden_log_p(toy, case, {i, *part}, i)
    for i in case.actions:
        want[i] += hidden_log_p(toy, case, set(case.maskable), i) / 2
    assert torch.allclose(published, want, atol=2e-6)
    assert torch.allclose(fixed, want / 1.5, atol=2e-6)
    assert abs(float(published.sum()) - any_order_elbo(toy, case).item()) > 0.1


@pytest.mark.parametrize(("normalise", "total"), [(False, 1.5), (True, 1.0)])
def test_coupled_weights_sum_to_three_halves_or_one(normalise: bool, total: float) -> None:
    case = CASES["anchors"]
    rows = 4000
    weight = (
        coupled(normalise=normalise)
        .make_views(case.rollout(rows), case.toy().mask_id, seeded(2))
        .weight.sum(1)
    )
    mean = weight.mean(0)[PROMPT:]
    error = weight.std(0)[PROMPT:] / rows**0.5
    assert float(mean[0]) == 0  # the anchor
    assert ((mean - total).abs() < 4 * error)[1:].all() and (error < 0.01).all()


def unigrpo_counts(first: list[int], index: int, total: int, steps: int, monkeypatch) -> list[int]:
    """Masked tokens of rows with ``steps`` tokens whose position uniforms are (j + 1/2) / steps:
    t_n of each row.
    """
    rollout = finished_rollout(
        [[0] * steps] * len(first), [list(range(1, steps + 1))] * len(first), eos_id=9
    )
    share = (torch.tensor(first, dtype=torch.float64) - 0.5) / steps
    grid = (torch.arange(-PROMPT, steps, dtype=torch.float64) + 0.5) / steps
    views = views_by_hand(
        monkeypatch,
        "unigrpo",
        unigrpo(num_steps=steps),
        rollout,
        3,
        row=share,
        position=grid.expand(rollout.ids.shape),
        update=Update(index=index, total=total),
    )
    return (views.ids[:, 0, PROMPT:] == 3).sum(-1).tolist()


def test_unigrpo_schedule_by_hand(monkeypatch) -> None:
    """T = 4, mu = 4: t_1 random, t_n = floor((n - 1) / 3 * (4 - t_1) + t_1), the last one masks
    everything.
    """
    rows = [unigrpo_counts([1, 2, 3, 4], n, 4, 4, monkeypatch) for n in range(4)]
    assert rows == [[1, 2, 3, 4], [2, 2, 3, 4], [3, 3, 3, 4], [4, 4, 4, 4]]


def test_unigrpo_schedule_has_no_rounding_errors(monkeypatch) -> None:
    first = list(range(1, 129))
    for total in (1, 2, 3, 4, 7, 8, 12):
        for index in range(total):
            done = Fraction(index, total - 1) if total > 1 else Fraction(0)
            want = [math.floor(done * (128 - t) + t) for t in first]
            assert unigrpo_counts(first, index, total, 128, monkeypatch) == want
            assert index + 1 < total or total == 1 or want == [128] * 128


def test_unigrpo_draws_one_first_step_per_row_for_all_inner_updates() -> None:
    """Rates are read off rows of 4000 tokens; T = 8 puts them 15 standard errors apart. The masks
    themselves are redrawn.
    """
    steps = 8
    length = 4000
    rows = 40
    rollout = finished_rollout([[0] * length] * rows, [[1] * length] * rows, eos_id=9)
    made = unigrpo(num_steps=steps)
    masks = []
    rates = []
    for index in range(3):
        ids = made.make_views(rollout, 3, seeded(index), Update(index=index, total=3, seed=7)).ids[
            :, 0, PROMPT:
        ]
        masks.append(ids == 3)
        rates.append((masks[-1].double().mean(-1) * steps).round().long().tolist())
    assert len(set(rates[0])) >= 6
    assert rates[1] == [(t + steps) // 2 for t in rates[0]] and rates[2] == [steps] * rows
    partial = masks[0].double().mean(-1) < 0.95
    agree = (masks[0] & masks[1]).double().mean(-1)[partial]
    independent = (masks[0].double().mean(-1) * masks[1].double().mean(-1))[partial]
    assert torch.allclose(agree, independent, atol=0.05)
    other = made.make_views(rollout, 3, seeded(0), Update(index=0, total=3, seed=8)).ids[
        :, 0, PROMPT:
    ]
    assert ((other == 3).double().mean(-1) * steps).round().long().tolist() != rates[0]


@ON_SOME
def test_unigrpo_scores_what_it_masked(case: Case, monkeypatch) -> None:
    made = unigrpo(num_steps=4, hide_anchors=case.hide_anchors)
    toy = case.toy()
    for first in (1, 3):
        for order in itertools.permutations(range(4)):
            keys = torch.full((1, PROMPT + 4), 0.0, dtype=torch.float64)
            keys[0, PROMPT:] = (torch.tensor(order) + 0.5) / 4
            share = torch.tensor([(first - 0.5) / 4], dtype=torch.float64)
            views = views_by_hand(
                monkeypatch, "unigrpo", made, case.rollout(), toy.mask_id, row=share, position=keys
            )
            got = token_logps(toy, case.rollout(), made, views)[0, PROMPT:]
            hidden = {i for i in case.maskable if order[i] < first}
            want = [
                hidden_log_p(toy, case, hidden, i) if i in hidden and i in case.actions else 0.0
                for i in range(4)
            ]
            assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(
    "name", ["free", "inconsistent", "anchors", "two anchors", "eos", "eos, anchors around it"]
)
@pytest.mark.parametrize("num_mc", [1, 2])
def test_the_lower_bound_with_random_masks_is_the_elbo(name: str, num_mc: int, monkeypatch) -> None:
    case = CASES[name]
    outcomes = every_order(case.candidates, len(case.candidates))
    made = sandwich(num_mc=num_mc, mask="random")
    toy = case.toy()
    rollout = case.rollout(len(outcomes.orders))
    good = Update(advantages=torch.ones(len(outcomes.orders)))
    views = views_by_hand(
        monkeypatch,
        "sandwich",
        made,
        rollout,
        toy.mask_id,
        row=outcomes.share,
        position=outcomes.keys,
        update=good,
    )
    got = token_logps(toy, rollout, made, views).sum(-1).mean()
    assert got.item() == pytest.approx(any_order_elbo(toy, case).item(), abs=2e-6)


def hand_made_masks(
    case: Case, masks: list[set[int]], made, advantage: float | None, monkeypatch
) -> tuple[Views, Tensor]:
    """The sandwich's views of one row with these masks (one per stratum of the counts), and its
    token values.
    """
    toy = case.toy()
    f = len(case.candidates)
    share = {(len(m) - 0.5) / f * len(masks) - k for k, m in enumerate(masks)}
    assert len(share) == 1, "the strata share one uniform"
    keys = [
        torch.tensor(
            [[0.5] * PROMPT + [0.1 if i in m else 0.5 for i in range(4)]], dtype=torch.float64
        )
        for m in masks
    ]
    update = Update(advantages=None if advantage is None else torch.tensor([advantage]))
    views = views_by_hand(
        monkeypatch,
        "sandwich",
        made,
        case.rollout(),
        toy.mask_id,
        row=torch.tensor([share.pop()], dtype=torch.float64),
        position=lambda rollout, seed, kind, k: keys[min(k, len(masks) - 1)],
        update=update,
    )
    return views, token_logps(toy, case.rollout(), made, views)[0, PROMPT:]


BOUNDS = [
    ("inconsistent", [{1}, {0, 1, 3}]),  # one token hidden twice, one never
    ("inconsistent", [{0, 2}, {0, 1, 2, 3}]),
    ("anchors", [{1, 2, 3}]),
    ("anchors", [{2}]),
]


@pytest.mark.parametrize(("name", "masks"), BOUNDS, ids=str)
@pytest.mark.parametrize("beta", [1.0, 1.5])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_sandwich_is_its_formula_on_hand_made_masks(
    name: str, masks: list, beta: float, mix: float, monkeypatch
) -> None:
    case = CASES[name]
    toy = case.toy()
    f = len(case.actions)
    k = len(masks)
    made = sandwich(num_mc=k, mix=mix, beta=beta, mask="random")
    once = set().union(*masks)
    lower = [0.0] * 4
    upper = [0.0] * 4
    for i in once:
        terms = [(f / len(m), hidden_log_p(toy, case, m, i)) for m in masks if i in m]
        lower[i] = sum(weight * logp for weight, logp in terms) / k
        inside = sum(weight * math.exp(beta * logp) for weight, logp in terms) / k
        upper[i] = f / (beta * len(once)) * math.log(inside)
    for advantage, share in ((1.0, 0.0), (0.0, 0.0), (None, 0.0), (-1.0, mix), (-0.01, mix)):
        _, got = hand_made_masks(case, masks, made, advantage, monkeypatch)
        for i in range(4):
            assert float(got[i]) == pytest.approx(
                share * upper[i] + (1 - share) * lower[i], abs=2e-6
            )
    if masks == [{1, 2, 3}]:  # everything hidden, t = 1: both bounds are the mean field
        assert upper == pytest.approx(lower)


def block_views(p: float, num_mc: int, *, rows: int = 2000, seed: int = 4) -> tuple[Tensor, Tensor]:
    """What is hidden (B, M, L) and weights, on rows of four blocks of two: free, or ended in the
    third block.
    """
    rollout = finished_rollout(
        [[0] * 8 if b % 2 else [0, 0, 0, 0, 9, 9, 9, 9] for b in range(rows)],
        [list(range(1, 9))] * rows,
        eos_id=9,
        prompt=5,
    )
    views = sandwich(num_mc=num_mc, block_length=2, p_mask_context=p).make_views(
        rollout, 3, seeded(seed)
    )
    return views.ids == 3, views.weight


def test_blocks_are_distinct_and_uniform_and_later_ones_are_hidden() -> None:
    hidden, weight = block_views(0.0, 4)
    prompt = hidden[..., :5]
    blocks = hidden[..., 5:].unflatten(-1, (4, 2))
    assert not prompt.any()
    chosen = blocks.any(-1).long().argmax(-1)  # the first block in which anything is hidden
    free = torch.arange(len(chosen)) % 2 == 1
    assert (chosen[free].sort(-1).values == torch.arange(4)).all()
    # an ended row has blocks 0, 1 and the half of block 2 up to its EOS; the fourth draw begins
    # again with the first
    assert (chosen[~free, :3].sort(-1).values == torch.arange(3)).all()
    assert (chosen[~free, 3] == chosen[~free, 0]).all()
    assert chi_square_p(chosen[free, 0].bincount(minlength=4), torch.full((4,), 0.25)) > 1e-4
    assert chi_square_p(chosen[~free, 0].bincount(minlength=3), torch.full((3,), 1 / 3)) > 1e-4
    index = torch.arange(4)
    later = index > chosen[..., None]
    assert blocks.all(-1)[later].all()
    assert not blocks.any(-1)[index < chosen[..., None]].any()
    # in the chosen block one or two tokens, equally often, and which one is a coin
    inside = blocks.gather(2, chosen[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)[free, 0]
    assert chi_square_p(inside.sum(-1).bincount(minlength=3)[1:], torch.full((2,), 0.5)) > 1e-4
    single = inside[inside.sum(-1) == 1]
    assert chi_square_p(single.long().sum(0), torch.full((2,), 0.5)) > 1e-4
    # every hidden token counts, f / |M| each: draws sum to f
    actions = torch.where(free, 8, 5)[:, None].float()
    assert torch.equal(
        weight[..., 5:] > 0, hidden[..., 5:] & (torch.arange(8) < actions[..., None])
    )
    assert torch.allclose(weight.sum(-1) * 4, actions.expand(-1, 4))


def test_context_is_hidden_at_its_rate_prompt_too() -> None:
    rate, (plain, _), (noisy, _) = 0.3, block_views(0.0, 2), block_views(0.3, 2)
    blocks = plain[..., 5:].unflatten(-1, (4, 2))
    chosen = blocks.any(-1).long().argmax(-1)
    earlier = (torch.arange(4) < chosen[..., None])[..., None].expand(-1, -1, -1, 2).flatten(-2)
    assert torch.equal(plain[..., 5:][~earlier], noisy[..., 5:][~earlier])
    draws = noisy[..., 5:][earlier].double()
    spread = math.sqrt(rate * (1 - rate))
    assert abs(float(draws.mean()) - rate) < 4 * spread / len(draws) ** 0.5
    prompt = noisy[..., :5]
    assert (prompt[:, 0] != prompt[:, 1]).any()  # a prompt mask of its own for each draw
    assert abs(float(prompt.double().mean()) - rate) < 4 * spread / (10 * len(prompt)) ** 0.5


@pytest.mark.parametrize("name", ["inconsistent", "anchors", "eos"])
def test_the_block_lower_bound_is_its_formula_and_no_elbo(name: str) -> None:
    case = CASES[name]
    rows = 500
    made = sandwich(block_length=2, p_mask_context=0.2)
    toy = case.toy()
    rollout = case.rollout(rows)
    views = made.make_views(rollout, toy.mask_id, seeded(8))
    got = token_logps(toy, rollout, made, views)[:, PROMPT:]
    for row in range(0, rows, 25):
        want = [0.0] * 4
        for k in range(2):
            masked = {
                i for i in range(case.end) if int(views.ids[row, k, PROMPT + i]) == toy.mask_id
            }
            for i in masked:
                visible = set(range(case.end)) - masked
                want[i] += (
                    len(case.actions) / (2 * len(masked)) * log_p(toy, case, visible, i).item()
                )
        assert torch.allclose(got[row], torch.tensor(want, dtype=torch.float64), atol=2e-6)
    values = got.sum(-1)
    assert (
        abs(float(values.mean()) - any_order_elbo(toy, case).item())
        > 4 * float(values.std()) / rows**0.5
    )


def test_with_hidden_anchors_draws_that_hide_anchors_alone_score_nothing(monkeypatch) -> None:
    """t_k counts free tokens only, so that the lower bound is nearer to 0 than the ELBO there:
    known, and small.
    """
    case = CASES["hidden anchors"]
    outcomes = every_order(case.candidates, len(case.candidates))
    made = sandwich(num_mc=1, mask="random", hide_anchors=True)
    toy = case.toy()
    rollout = case.rollout(len(outcomes.orders))
    views = views_by_hand(
        monkeypatch,
        "sandwich",
        made,
        rollout,
        toy.mask_id,
        row=outcomes.share,
        position=outcomes.keys,
    )
    scored = (views.weight != 0).any(-1).squeeze(1)
    assert 0 < float((~scored).double().mean()) < 0.3
    assert (view_logps(toy, rollout, views)[~scored] == 0).all()
    assert (
        token_logps(toy, rollout, made, views).sum(-1).mean().item()
        > any_order_elbo(toy, case).item()
    )
