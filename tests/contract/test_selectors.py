"""What every position rule promises. A new one adds a line to SETTINGS (whether it needs logits,
and the drawn token).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import QUOTA_RULES, HashDenoiser, seeded
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import RULES, decode
from unmaskrl.core.decoding.sample import drawn_confidence, masked_log_softmax

SETTINGS = {
    "confidence": {"needs_logits": True, "needs_draw": True},
    "max_prob": {"needs_logits": True, "needs_draw": False},
    "entropy": {"needs_logits": True, "needs_draw": False},
    "margin": {"needs_logits": True, "needs_draw": False},
    "random": {"needs_logits": False, "needs_draw": False},
    "left_to_right": {"needs_logits": False, "needs_draw": False},
    "eb": {"needs_logits": True, "needs_draw": False},
    "eb_max_prob": {"needs_logits": True, "needs_draw": False},
    "eb_margin": {"needs_logits": True, "needs_draw": False},
    "confidence_threshold": {"needs_logits": True, "needs_draw": False},
    "factor": {"needs_logits": True, "needs_draw": False},
}
EVERY = pytest.mark.parametrize("name", sorted(RULES))
GAMMA = {name: 0.5 for name, rule in RULES.items() if rule.prefix}
ROWS = 12
VOCAB = 9
MASK = 4


def test_every_rule_is_in_this_battery_and_says_what_it_needs() -> None:
    assert set(SETTINGS) == set(RULES)
    for name, needs in SETTINGS.items():
        assert {key: getattr(RULES[name], key) for key in needs} == needs


def scores(name: str, logits: Tensor, token: Tensor, uniform: Tensor, offset: Tensor) -> Tensor:
    """The rule's scores, given no more than it asked for."""
    rule = RULES[name]
    if not rule.needs_logits:
        return rule.score(None, None, uniform, offset)
    if rule.needs_draw:
        return rule.score(None, drawn_confidence(logits, token), uniform, offset)
    return rule.score(masked_log_softmax(logits, MASK, 1.0), None, uniform, offset)


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    return (
        torch.randn(ROWS, VOCAB, generator=generator) * 3,
        torch.randint(0, MASK, (ROWS,), generator=generator),
        torch.rand(ROWS, generator=generator, dtype=torch.float64),
        torch.arange(ROWS),
    )


@EVERY
def test_scores_are_finite_one_per_position_and_positions_do_not_mix(name: str) -> None:
    data = inputs(1)
    whole = scores(name, *data)
    assert (
        whole.shape == (ROWS,) and torch.isfinite(whole).all() and len(set(whole.tolist())) == ROWS
    )
    order = torch.tensor([5, 2, 11, 0])
    assert torch.allclose(scores(name, *(x[order] for x in data)), whole[order], atol=1e-6)


@EVERY
def test_scores_survive_extreme_logits(name: str) -> None:
    logits, token, uniform, offset = inputs(2)
    logits = logits * 1e4
    logits[0] = 0.0
    logits[1] = -1e9
    logits[2, MASK] = 1e9
    assert torch.isfinite(scores(name, logits, token, uniform, offset)).all()


@EVERY
@pytest.mark.parametrize(("block_length", "steps"), [(8, 8), (8, 3), (4, 5), (2, 1)])
def test_the_highest_scores_of_the_active_block_are_revealed(
    name: str, block_length: int, steps: int
) -> None:
    """Every call reveals open positions of the first open block only, at least one, and never moves
    what is revealed.
    """
    denoiser = HashDenoiser(length=8, eos_bias=-1e9)
    canvas = anchored_canvas(
        [[1]] * 5, [{}, {0: 1}, {1: 2, 6: 3}, {4: 1, 5: 1}, {7: 0}], gen_length=8, denoiser=denoiser
    )
    rollout = decode(
        denoiser,
        canvas,
        block_length=block_length,
        steps=steps,
        select=name,
        gamma=GAMMA.get(name),
        temperature=0.7,
        generator=seeded(4),
    )
    for row in range(5):
        step = rollout.decoded_step[row, -8:].tolist()
        for call in range(1, int(rollout.nfe[row]) + 1):
            opened = [c for c in range(8) if step[c] >= call]
            revealed = [c for c in range(8) if step[c] == call]
            assert revealed
            assert {c // block_length for c in revealed} == {opened[0] // block_length}


@pytest.mark.parametrize("name", sorted(set(QUOTA_RULES) - {"random"}))  # uniforms do not tie
def test_ties_go_to_the_left(name: str) -> None:
    denoiser = HashDenoiser(length=6, eos_bias=-1e9)
    # one token is certain: every score is exact, whatever rounds how
    denoiser.table = torch.full_like(denoiser.table, -1e9)
    denoiser.table[..., 0] = 0.0
    canvas = blank_canvas([[1]], gen_length=6, denoiser=denoiser)
    rollout = decode(denoiser, canvas, block_length=6, steps=3, select=name)
    assert rollout.decoded_step.tolist() == [[0, 1, 1, 2, 2, 3, 3]]


@EVERY
def test_greedy_decoding_repeats_and_random_needs_the_generator(name: str) -> None:
    denoiser = HashDenoiser(length=8)
    canvas = blank_canvas([[1]] * 20, gen_length=8, denoiser=denoiser)

    def run(seed: int, temperature: float):
        return decode(
            denoiser,
            canvas,
            block_length=4,
            steps=8,
            select=name,
            gamma=GAMMA.get(name),
            temperature=temperature,
            generator=seeded(seed),
        )

    assert torch.equal(run(1, 0.9).ids, run(1, 0.9).ids)
    assert not torch.equal(run(1, 0.9).ids, run(2, 0.9).ids)
    assert torch.equal(run(1, 0.0).decoded_step, run(2, 0.0).decoded_step) == (name != "random")


@EVERY
def test_exact_rules_choose_positions_before_tokens_are_drawn(name: str) -> None:
    """The first call's positions must not depend on the tokens' random numbers, and do so for
    inexact rules.
    """
    denoiser = HashDenoiser(length=8, eos_bias=-1e9)
    canvas = blank_canvas([[1]] * 60, gen_length=8, denoiser=denoiser)
    rollout = decode(
        denoiser,
        canvas,
        block_length=8,
        steps=8,
        select=name,
        gamma=GAMMA.get(name),
        temperature=2.0,
        generator=seeded(3),
    )
    first = (rollout.decoded_step[:, -8:] == 1).long().argmax(-1)
    assert rollout.exact == (not SETTINGS[name]["needs_draw"])
    if name != "random":
        assert (len(set(first.tolist())) == 1) == rollout.exact
