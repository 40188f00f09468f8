"""Position rules against plain Python on lists of probabilities."""

from __future__ import annotations

import itertools
from math import exp, log

import pytest
import torch

from tests.conftest import seeded
from unmaskrl.core.decoding.sample import (
    draw,
    drawn_confidence,
    inverse_cdf,
    masked_log_softmax,
    row_chunks,
)
from unmaskrl.core.decoding.select import RULES

LOGITS = torch.randn(6, 5, generator=seeded(2), dtype=torch.float64)
MASK = 3
UNIFORM = torch.rand(6, generator=seeded(3), dtype=torch.float64)
OFFSET = torch.tensor([4, 0, 2, 3, 1, 5])


def probabilities(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [0.0 if i == MASK else exp(x / temperature) for i, x in enumerate(logits)]
    return [w / sum(weights) for w in weights]


ORACLE = {
    "max_prob": lambda p, u, c: log(max(p)),
    "entropy": lambda p, u, c: sum(x * log(x) for x in p if x > 0),
    "margin": lambda p, u, c: sorted(p)[-1] - sorted(p)[-2],
    "random": lambda p, u, c: u,
    "left_to_right": lambda p, u, c: -c,
}


@pytest.mark.parametrize("name", sorted(ORACLE))
def test_scores_by_hand(name: str) -> None:
    rule = RULES[name]
    assert not rule.needs_draw
    logps = masked_log_softmax(LOGITS, MASK, 1.0) if rule.needs_logits else None
    got = rule.score(logps, None, UNIFORM, OFFSET)
    rows = zip(LOGITS.tolist(), UNIFORM.tolist(), OFFSET.tolist(), strict=True)
    want = [ORACLE[name](probabilities(x), u, c) for x, u, c in rows]
    assert got.tolist() == pytest.approx(want, abs=1e-12)


def test_confidence_is_the_log_prob_of_the_drawn_token_with_the_mask_token_in_the_sum() -> None:
    token = torch.tensor([0, 1, 2, 4, 0, 1])
    scores = drawn_confidence(LOGITS, token)
    want = [
        x[t] - log(sum(map(exp, x))) for x, t in zip(LOGITS.tolist(), token.tolist(), strict=True)
    ]
    assert scores.tolist() == pytest.approx(want, abs=1e-12)
    assert torch.equal(RULES["confidence"].score(None, scores, UNIFORM, OFFSET), scores)
    assert RULES["confidence"].needs_draw


def test_entropy_survives_impossible_tokens_and_certainty() -> None:
    logps = masked_log_softmax(
        torch.tensor([[0.0, float("-inf"), 0.0], [0.0, float("-inf"), -1e9]]), 1, 1.0
    )
    assert RULES["entropy"].score(logps, None, UNIFORM[:2], OFFSET[:2]).tolist() == pytest.approx(
        [-log(2), 0.0]
    )


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
def test_masked_log_softmax_by_hand(temperature: float) -> None:
    got = masked_log_softmax(LOGITS, MASK, temperature).exp()
    for row, logits in zip(got.tolist(), LOGITS.tolist(), strict=True):
        assert row == pytest.approx(probabilities(logits, temperature or 1.0), abs=1e-12)


def test_masked_log_softmax_is_fp32_at_least() -> None:
    assert masked_log_softmax(LOGITS.bfloat16(), MASK, 0.7).dtype == torch.float32
    assert masked_log_softmax(LOGITS, MASK, 0.7).dtype == torch.float64


def test_inverse_cdf_takes_the_cell_of_the_uniform_and_skips_impossible_tokens() -> None:
    # four tokens of mass exp(0) = 1: the bounds of the cells are exact on every processor
    never = float("-inf")
    logps = torch.tensor([never, 0.0, never, 0.0, 0.0, 0.0, never], dtype=torch.float64)
    for uniform, token in [
        (2.0**-53, 1),
        (0.2499, 1),
        (0.25, 3),
        (0.4999, 3),
        (0.5, 4),
        (0.7499, 4),
        (0.75, 5),
        (1 - 2.0**-53, 5),
        (1.0, 5),
    ]:
        assert inverse_cdf(logps[None], torch.tensor([uniform], dtype=torch.float64)).tolist() == [
            token
        ]


def test_inverse_cdf_normalises_what_rounding_left_over() -> None:
    """fp32 log-probs of a large vocabulary do not sum to 1; the last uniforms must still land on
    possible tokens.
    """
    logps = torch.full((2, 1000), -8.0)
    logps[:, 700:] = float("-inf")
    assert inverse_cdf(logps, torch.tensor([0.5, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [
        350,
        699,
    ]


def test_inverse_cdf_on_a_grid_gives_each_token_its_share() -> None:
    probs = LOGITS[0].softmax(-1)
    grid = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    counts = inverse_cdf(probs.log().expand(10000, -1), grid).bincount(minlength=5)
    assert (counts / 10000 - probs).abs().max() <= 1e-4


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 700])
def test_inverse_cdf_is_a_linear_scan_whatever_the_vocabulary(vocab: int) -> None:
    """Long stretches of impossible tokens, and uniforms just beside the steps of the CDF."""
    probs = torch.rand(vocab, generator=seeded(8), dtype=torch.float64)
    probs[torch.rand(vocab, generator=seeded(9)) < 0.7] = 0.0
    probs[vocab // 3 : vocab // 3 + 200] = 0.0
    probs[-1] = 0.4
    cdf = list(itertools.accumulate((probs / probs.sum()).tolist()))
    steps = [c + shift for c in cdf for shift in (-1e-9, 1e-9) if 0 < c + shift < 1][:400]
    uniform = torch.cat(
        [
            torch.tensor(steps, dtype=torch.float64),
            torch.rand(300, generator=seeded(1), dtype=torch.float64),
        ]
    )
    want = [next(v for v, c in enumerate(cdf) if u < c) for u in uniform.tolist()]
    got = inverse_cdf((probs / probs.sum()).log().expand(len(uniform), -1), uniform)
    assert got.tolist() == want
    assert (probs[got] > 0).all()


def test_the_mask_token_is_blocked_at_any_finite_logit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(2, 5, dtype=dtype)
        logits[0, MASK] = 1e30
        logits[1, MASK] = -1e30
        probs = masked_log_softmax(logits, MASK, 0.5).exp()
        assert probs.tolist() == [pytest.approx([0.25, 0.25, 0.25, 0.0, 0.25])] * 2


def test_draw_is_greedy_at_temperature_0_and_takes_the_first_of_ties() -> None:
    logps = torch.tensor([[-1.0, -0.5, -0.5], [-0.1, -3.0, -3.0]])
    uniform = torch.tensor([0.99, 0.99], dtype=torch.float64)
    assert draw(logps, 0.0, uniform).tolist() == [1, 0]
    assert draw(logps, 1.0, uniform).tolist() == [2, 2]


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 5), (7, 5), (8, 5), (3, 100)])
def test_row_chunks_cover_all_rows_once_within_the_bound(
    monkeypatch, rows: int, vocab: int
) -> None:
    monkeypatch.setattr("unmaskrl.core.decoding.sample.CHUNK_ELEMENTS", 20)
    slices = list(row_chunks(rows, vocab))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(rows))
    assert all((s.stop - s.start) * vocab <= 20 or s.stop - s.start == 1 for s in slices)
    assert len(slices) == -(-rows // max(1, 20 // vocab))
