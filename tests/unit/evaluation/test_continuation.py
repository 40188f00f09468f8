"""Likelihood of given answers: exact for one token, the any-order ELBO by hand for two, and what it
may not depend on.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import tiny_llada
from unmaskrl.evaluation.continuation import continuation_logps, given_rollout, greedy_matches

DENOISER = tiny_llada()
MASK = DENOISER.mask_id
PAIRS = [
    ([1, 2, 3], [4]),
    ([5], [6, 7]),
    ([1, 2, 3], [8, 9]),
    ([1, 2, 3], [4, 5, 6, 7]),
    ([2], []),
    ([5], [7, 6]),
]


def log_p(context: list[int], canvas: list[int], offset: int, token: int) -> float:
    logits = DENOISER.logits(torch.tensor([context + canvas])).detach()[0, len(context) + offset]
    logits[MASK] = float("-inf")
    return float(logits.log_softmax(-1)[token])


def logps(
    pairs=PAIRS, num_mc: int = 8, seed: int = 0, batch_size: int = 4, max_canvases: int = 64
) -> list[float]:
    return continuation_logps(
        DENOISER, pairs, num_mc=num_mc, seed=seed, batch_size=batch_size, max_canvases=max_canvases
    )


def test_one_token_is_exact_and_nothing_is_certain() -> None:
    got = logps()
    assert got[0] == pytest.approx(log_p([1, 2, 3], [MASK], 0, 4), abs=1e-6)
    assert got[4] == 0.0


def test_two_tokens_are_the_mean_over_both_orders() -> None:
    """Half the sum of log p along either order of revealing the two tokens."""
    first, second = (log_p([5], [MASK, MASK], i, y) for i, y in enumerate((6, 7)))
    after_first = log_p([5], [6, MASK], 1, 7)
    after_second = log_p([5], [MASK, 7], 0, 6)
    exact = (first + after_first + second + after_second) / 2
    # the standard error of 250 draws is 0.0085 (over 30 seeds); one order alone is off by 1.7
    assert logps(PAIRS[1:2], num_mc=250, max_canvases=500)[0] == pytest.approx(exact, abs=0.04)
    assert abs(first + after_first - exact) > 1.0, "orders that agree would test nothing"


def test_values_do_not_depend_on_the_other_requests() -> None:
    together = logps()
    assert logps(PAIRS[::-1], batch_size=2, max_canvases=3)[::-1] == pytest.approx(
        together, abs=1e-6
    )
    assert [logps([pair])[0] for pair in PAIRS] == pytest.approx(together, abs=1e-6)
    assert logps(seed=1)[3] != pytest.approx(together[3], abs=1e-6)


def test_answers_to_one_question_share_their_draws() -> None:
    names = given_rollout(DENOISER, [PAIRS[2], PAIRS[1], ([1, 2, 3], [9, 8])]).row_ids.tolist()
    assert names[0] == names[2] != names[1]


def test_greedy_is_what_decoding_would_say() -> None:
    """The most confident position first, one per call, at the answer's own length."""
    context = [1, 2, 3]
    canvas = [MASK] * 4
    while MASK in canvas:
        logits = DENOISER.logits(torch.tensor([context + canvas])).detach()[0, 3:]
        confidence = logits.log_softmax(-1)
        confidence[:, MASK] = float("-inf")
        best = confidence.max(-1)
        order = [(-float(v), i) for i, v in enumerate(best.values) if canvas[i] == MASK]
        position = min(order)[1]
        canvas[position] = int(best.indices[position])
    other = [*canvas[:-1], (canvas[-1] + 1) % 11]
    assert greedy_matches(
        DENOISER, [(context, canvas), (context, other), (context, [])], batch_size=2
    ) == [True, False, True]


def test_a_batch_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        logps(batch_size=0)
