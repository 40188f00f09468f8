"""Position rules: which open positions to reveal first. Pure functions; a higher score is revealed earlier.

A rule sees, for R open positions of the active blocks, the log-probabilities ``logps_RV`` of the model at temperature 1
without the mask token, a uniform that belongs to the position, and its offset in the completion. ``confidence`` alone
sees the log-probability of the token drawn there instead.

A rule that looks at the drawn token makes the rollout inexact: the probability of the revealed token is then no longer
the probability that it was revealed (two masks, both (0.6, 0.4), one reveal: the 0.6 token appears with 0.84).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Score = Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]


class Rule(NamedTuple):
    """A position rule: its score, whether it needs logits, and whether it looks at the drawn token."""

    score: Score
    needs_logits: bool = True
    needs_draw: bool = False


def confidence(logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor) -> Float[Tensor, " R"]:
    """LLaDA's low-confidence rule: log-probability of the drawn token (arXiv 2502.09992, published generate)."""
    assert drawn_logps is not None
    return drawn_logps


def max_prob(logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor) -> Float[Tensor, " R"]:
    """max_v log p(v)."""
    assert logps_RV is not None
    return logps_RV.amax(-1)


def entropy(logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor) -> Float[Tensor, " R"]:
    """-H(p) = sum_v p(v) log p(v), in nats; lowest entropy first."""
    assert logps_RV is not None
    return (logps_RV.exp() * logps_RV.clamp(min=-1e4)).sum(-1)  # the mask token has p = 0, log p = -inf


def margin(logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor) -> Float[Tensor, " R"]:
    """p(best) - p(second best)."""
    assert logps_RV is not None
    best = logps_RV.topk(2, dim=-1).values.exp()
    return best[:, 0] - best[:, 1]


def random(logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor) -> Float[Tensor, " R"]:
    """A uniformly random order."""
    return uniform


def left_to_right(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """Position order."""
    return -offset.double()


RULES: dict[str, Rule] = {
    "confidence": Rule(confidence, needs_draw=True),
    "max_prob": Rule(max_prob),
    "entropy": Rule(entropy),
    "margin": Rule(margin),
    "random": Rule(random, needs_logits=False),
    "left_to_right": Rule(left_to_right, needs_logits=False),
}
