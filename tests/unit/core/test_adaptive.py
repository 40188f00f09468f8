"""Adaptive position rules: entropy-bounded decoding, threshold, factor; calls, exactness, per-row
gamma.
"""

from __future__ import annotations

import itertools
from math import inf

import pytest
import torch
from torch import Tensor

from tests.conftest import HashDenoiser, chi_square_p, seeded, tiny_llada
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import RULES, decode
from unmaskrl.core.decoding.select import above_threshold, entropy_bounded, within_factor
from unmaskrl.core.estimators import trajectory
from unmaskrl.core.scoring import token_logps
from unmaskrl.core.toy import ToyDenoiser
from unmaskrl.core.types import Rollout

EB = ("eb", "eb_max_prob", "eb_margin")


def greedy(
    gamma, *, select: str = "eb", length: int = 8, block_length: int = 4, **options
) -> Rollout:
    denoiser = HashDenoiser(length=length, eos_bias=-1e9)
    canvas = blank_canvas([[1]] * 6, gen_length=length, denoiser=denoiser)
    return decode(
        denoiser,
        canvas,
        block_length=block_length,
        steps=length,
        select=select,
        gamma=gamma,
        **options,
    )


def test_the_prefix_is_the_brute_force_one_in_any_order() -> None:
    generator = seeded(1)
    entropy = torch.rand(400, 6, generator=generator, dtype=torch.float64) * 2
    entropy[::5, 2] = 0.0
    valid = torch.arange(6) < torch.randint(1, 7, (400, 1), generator=generator)
    gamma = torch.rand(400, generator=generator, dtype=torch.float64) * 3
    got = entropy_bounded(-entropy, valid, gamma)
    for row in range(400):
        h = entropy[row][valid[row]].tolist()
        fits = [n for n in range(1, len(h) + 1) if sum(h[:n]) - max(h[:n]) <= float(gamma[row])]
        assert int(got[row]) == max(fits)
        assert fits == list(range(1, max(fits) + 1))  # the bound never falls along the prefix


@pytest.mark.parametrize("select", EB)
def test_decoding_reveals_the_largest_prefix_of_its_order(select: str) -> None:
    """Each call of a real decode against the rule worked out from the logits of that call."""
    denoiser = tiny_llada()
    canvas = anchored_canvas([[1, 2], [3], [4]], [{}, {2: 1}, {}], gen_length=6, denoiser=denoiser)
    gamma = torch.tensor([0.5, 1.5, 4.0])
    options = {
        "block_length": 6,
        "steps": 6,
        "select": select,
        "gamma": gamma,
        "stop_at_eos": False,
    }
    rollout = decode(denoiser, canvas, temperature=1.0, generator=seeded(3), **options)
    assert torch.equal(rollout.gamma, gamma.double()) and rollout.exact
    for row in range(3):
        for call in range(1, int(rollout.nfe[row]) + 1):
            z = rollout.latent(torch.full_like(rollout.nfe, call - 1), denoiser.mask_id)[
                row : row + 1
            ]
            logits = denoiser.logits(z, rollout.attention_mask[row : row + 1])[0, -6:].detach()
            logits[:, denoiser.mask_id] = -inf
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
            top = logp.exp().topk(2, -1).values
            proxy = {"eb": entropy, "eb_max_prob": -top[:, 0], "eb_margin": top[:, 1] - top[:, 0]}[
                select
            ]
            opened = [c for c in range(6) if int(z[0, -6 + c]) == denoiser.mask_id]
            order = sorted(opened, key=lambda c: float(proxy[c]))
            h = [float(entropy[c]) for c in order]
            size = max(
                n
                for n in range(1, len(h) + 1)
                if sum(h[:n]) - max(h[:n]) <= float(gamma[row]) or n == 1
            )
            assert {c for c in opened if int(rollout.decoded_step[row, -6 + c]) == call} == set(
                order[:size]
            )


@pytest.mark.parametrize("select", EB)
@pytest.mark.parametrize("block_length", [8, 4, 2])
def test_gamma_0_is_one_token_per_call_and_inf_one_call_per_block(
    select: str, block_length: int
) -> None:
    assert greedy(0.0, select=select, block_length=block_length).nfe.tolist() == [8] * 6
    assert (
        greedy(inf, select=select, block_length=block_length).nfe.tolist()
        == [8 // block_length] * 6
    )


@pytest.mark.parametrize("select", ["eb", "factor"])
def test_calls_never_rise_with_gamma_at_the_first_call(select: str) -> None:
    first = [
        int((greedy(g, select=select, block_length=8).decoded_step == 1).sum())
        for g in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    ]
    assert first == sorted(first) and first[0] == 6 and first[-1] > first[0]


def test_threshold_and_factor_by_hand() -> None:
    p = torch.tensor([[0.95, 0.9, 0.6, 0.5], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    # decode reveals at least one
    assert above_threshold(p.log(), valid, torch.tensor([0.55, 0.55])).tolist() == [3, 0]
    # (n + 1) (1 - p): .1, .3, 1.6, 2.5 and 1.2, 2.1
    assert within_factor(p.log(), valid, torch.tensor([1.0, 1.0])).tolist() == [2, 0]
    assert within_factor(p.log(), valid, torch.tensor([2.0, 9.0])).tolist() == [3, 2]
    assert greedy(1.0, select="confidence_threshold").nfe.tolist() == [8] * 6  # nothing is above 1
    assert greedy(0.0, select="confidence_threshold").nfe.tolist() == [2] * 6


def test_rows_have_their_own_gamma_and_do_not_see_each_other() -> None:
    denoiser = tiny_llada()
    canvas = blank_canvas([[1], [2, 3], [4]], gen_length=6, denoiser=denoiser)
    gamma = torch.tensor([0.0, 1.0, inf], dtype=torch.float64)

    def run(rows: list[int]) -> Rollout:
        index = torch.tensor(rows)
        options = {
            "block_length": 6,
            "steps": 6,
            "select": "eb",
            "gamma": gamma[index],
            "temperature": 1.0,
        }
        return decode(denoiser, canvas.rows(index), generator=seeded(5), **options)

    whole = run([0, 1, 2])
    assert whole.nfe[2] == 1 and whole.nfe[0] > whole.nfe[2]
    for rows in ([2, 0], [1]):
        assert torch.equal(run(rows).ids, whole.ids[rows]) and torch.equal(
            run(rows).nfe, whole.nfe[rows]
        )


def test_gamma_may_be_chosen_from_the_first_call_at_no_extra_call() -> None:
    denoiser = tiny_llada()
    canvas = anchored_canvas(
        [[1], [2], [3]], [{}, dict.fromkeys(range(6), 1), {}], gen_length=6, denoiser=denoiser
    )
    seen: list[tuple[tuple[int, ...], list[int]]] = []

    def gamma(hidden: Tensor, rows: Tensor) -> Tensor:
        seen.append((tuple(hidden.shape), rows.tolist()))
        return torch.tensor([0.0, inf])

    rollout = decode(
        denoiser, canvas, block_length=6, steps=6, select="eb", gamma=gamma, stop_at_eos=False
    )
    assert seen == [((2, 7, 16), [0, 2])]  # once, for the rows that have something open
    assert rollout.nfe.tolist() == [6, 0, 1]


@pytest.mark.parametrize("select", [*EB, "confidence_threshold", "factor"])
def test_replay_of_an_adaptive_rollout_is_its_probability(select: str) -> None:
    denoiser = tiny_llada()
    canvas = anchored_canvas(
        [[1, 2], [5], [6]] * 3, [{}, {0: 2}, {}] * 3, gen_length=6, denoiser=denoiser
    )
    gamma = 0.3 if select == "confidence_threshold" else 1.2
    options = {
        "block_length": 3,
        "steps": 6,
        "select": select,
        "gamma": gamma,
        "temperature": 0.8,
        "exit_at": 0.7,
    }
    rollout = decode(denoiser, canvas, generator=seeded(2), **options)
    views = trajectory().make_views(rollout, denoiser.mask_id, seeded())
    replayed = token_logps(denoiser, rollout, trajectory(), views)
    assert rollout.exact and (rollout.exit_step > 0).any()
    assert torch.allclose(replayed, rollout.behavior_logps * rollout.action_mask, atol=1e-5)


def test_exit_after_eb_fills_the_rest_in_one_call() -> None:
    rollout = greedy(0.0, block_length=4, exit_at=0.5)
    assert rollout.nfe.tolist() == [5] * 6 and rollout.exit_step.tolist() == [5] * 6
    assert rollout.exit_mask.sum(-1).tolist() == [4] * 6


def test_drawn_completions_follow_the_law_of_the_process() -> None:
    """gamma=0 from an exact joint is exact sampling; gamma=inf is the product of marginals."""
    toy = ToyDenoiser.random(seeded(4), num_tokens=2, length=3)
    canvas = blank_canvas([[0]] * 4000, gen_length=3, denoiser=toy)
    joint = toy.log_joint().exp()
    marginal = torch.stack([joint[toy.completions[:, c] == 1].sum() for c in range(3)])
    product = torch.tensor(
        [
            float(
                torch.stack(
                    [marginal[c] if v else 1 - marginal[c] for c, v in enumerate(ids)]
                ).prod()
            )
            for ids in itertools.product(range(2), repeat=3)
        ]
    )
    for gamma, law in ((0.0, joint), (inf, product)):
        options = {
            "block_length": 3,
            "steps": 3,
            "select": "eb",
            "gamma": gamma,
            "temperature": 1.0,
        }
        ids = decode(toy, canvas, generator=seeded(7), **options).ids[:, -3:]
        counts = (ids * torch.tensor([4, 2, 1])).sum(-1).bincount(minlength=8)
        assert chi_square_p(counts, law.float()) > 1e-4
    assert chi_square_p(counts, joint.float()) < 1e-6  # and the two laws can be told apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "eb"}, "needs gamma"),
        ({"select": "entropy", "gamma": 0.1}, "takes no gamma"),
        ({"select": "eb", "gamma": -0.1}, "a bound in nats"),
        ({"select": "confidence_threshold", "gamma": 1.5}, r"a probability, in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_gammas_are_refused(options: dict, message: str) -> None:
    denoiser = HashDenoiser(length=4)
    canvas = blank_canvas([[1]], gen_length=4, denoiser=denoiser)
    with pytest.raises(ValueError, match=message):
        decode(denoiser, canvas, block_length=4, steps=4, **options)


def test_every_adaptive_rule_is_here() -> None:
    assert {name for name, rule in RULES.items() if rule.prefix} == {
        *EB,
        "confidence_threshold",
        "factor",
    }
