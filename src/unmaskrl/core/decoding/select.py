"""Position rules: which open positions to reveal first. Pure functions; a higher score is revealed
earlier.

A rule sees, for R open positions of the active blocks, the log-probabilities ``logps_RV`` of the
model at temperature 1 without the mask token, a uniform that belongs to the position, and its
offset in the completion. ``confidence`` alone sees the log-probability of the token drawn there
instead.

A rule that looks at the drawn token makes the rollout inexact: the probability of the revealed
token is then no longer the probability that it was revealed (two masks, both (0.6, 0.4), one
reveal: the 0.6 token appears with 0.84).

Adaptive rules (``prefix``) also say how many: they see the block's positions best first, with a
statistic of each, and take a prefix of them that grows with the row's ``gamma``; at least one. The
set is fixed before tokens are drawn, so they are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..precision import finest

Score = Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
Prefix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rule(NamedTuple):
    """A position rule: its score, whether it needs logits, and whether it looks at the drawn token.

    Adaptive rules have ``prefix``, which counts positions from their sorted ``statistic`` and
    gamma; ``unit`` is what gamma is. ``is_random``: the order itself is drawn. ``in_order``: from
    left to right.
    """

    score: Score
    needs_logits: bool = True
    needs_draw: bool = False
    statistic: Score | None = None
    prefix: Prefix | None = None
    unit: str = ""
    is_random: bool = False
    in_order: bool = False


def confidence(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor
) -> Float[Tensor, " R"]:
    """LLaDA's low-confidence rule: log-probability of the drawn token (arXiv 2502.09992, published
    generate).
    """
    assert drawn_logps is not None
    return drawn_logps


def max_prob(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor
) -> Float[Tensor, " R"]:
    """max_v log p(v)."""
    assert logps_RV is not None
    return logps_RV.amax(-1)


def entropy(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor
) -> Float[Tensor, " R"]:
    """-H(p) = sum_v p(v) log p(v), in nats; lowest entropy first."""
    assert logps_RV is not None
    # the mask token has p = 0, log p = -inf
    return (logps_RV.exp() * logps_RV.clamp(min=-1e4)).sum(-1)


def margin(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor
) -> Float[Tensor, " R"]:
    """p(best) - p(second best)."""
    assert logps_RV is not None
    best = logps_RV.topk(2, dim=-1).values.exp()
    return best[:, 0] - best[:, 1]


def random(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Tensor
) -> Float[Tensor, " R"]:
    """A uniformly random order."""
    return uniform


def left_to_right(
    logps_RV: Tensor | None, drawn_logps: Tensor | None, uniform: Tensor, offset: Int[Tensor, " R"]
) -> Float[Tensor, " R"]:
    """Position order."""
    return -finest(offset)


def entropy_bounded(
    minus_entropy_AG: Float[Tensor, "A G"],
    valid_AG: Bool[Tensor, "A G"],
    gamma: Float[Tensor, " A"],
) -> Int[Tensor, " A"]:
    """The largest prefix with sum H - max H <= gamma (EB sampler, arXiv 2505.24857), in nats; fp64.

    The left side bounds the joint dependence that is lost by drawing the prefix at once; it never
    falls along the prefix, in any order. gamma = 0: one token (and those of entropy 0); inf: the
    whole block.
    """
    entropy_AG = torch.where(valid_AG, -finest(minus_entropy_AG), 0.0).clamp(min=0)
    bound = entropy_AG.cumsum(-1) - entropy_AG.cummax(-1).values
    return (valid_AG & (bound <= gamma[:, None])).sum(-1)


def above_threshold(
    max_logp_AG: Float[Tensor, "A G"], valid_AG: Bool[Tensor, "A G"], gamma: Float[Tensor, " A"]
) -> Int[Tensor, " A"]:
    """Positions whose best token has a probability above gamma (Fast-dLLM, arXiv 2505.22618)."""
    return (valid_AG & (max_logp_AG.exp() > gamma[:, None])).sum(-1)


def within_factor(
    max_logp_AG: Float[Tensor, "A G"], valid_AG: Bool[Tensor, "A G"], gamma: Float[Tensor, " A"]
) -> Int[Tensor, " A"]:
    """The longest prefix on which (n + 1) (1 - p_n) < gamma at every n-th position (Fast-dLLM's
    factor).
    """
    n = torch.arange(1, max_logp_AG.shape[1] + 1, device=gamma.device)
    inside = valid_AG & ((n + 1) * (1 - max_logp_AG.exp()) < gamma[:, None])
    return inside.long().cumprod(-1).sum(-1)


NATS = "a bound in nats, >= 0"
PROBABILITY = "a probability, in [0, 1]"
FACTOR = "a factor, >= 0"
RULES: dict[str, Rule] = {
    "confidence": Rule(confidence, needs_draw=True),
    "max_prob": Rule(max_prob),
    "entropy": Rule(entropy),
    "margin": Rule(margin),
    "random": Rule(random, needs_logits=False, is_random=True),
    "left_to_right": Rule(left_to_right, needs_logits=False, in_order=True),
    "eb": Rule(entropy, statistic=entropy, prefix=entropy_bounded, unit=NATS),
    "eb_max_prob": Rule(max_prob, statistic=entropy, prefix=entropy_bounded, unit=NATS),
    "eb_margin": Rule(margin, statistic=entropy, prefix=entropy_bounded, unit=NATS),
    "confidence_threshold": Rule(
        max_prob, statistic=max_prob, prefix=above_threshold, unit=PROBABILITY
    ),
    "factor": Rule(max_prob, statistic=max_prob, prefix=within_factor, unit=FACTOR),
}
