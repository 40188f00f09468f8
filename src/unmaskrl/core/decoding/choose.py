"""Which of the open positions a denoiser call reveals, and the tokens drawn there."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..denoiser import Denoiser
from ..precision import finest_dtype
from ..rng import counter_uniform
from .law import Draws, Law, join
from .plan import Plan, Sizes, places
from .sample import (
    chunk_elements,
    confidence_at_one,
    drawn_confidence,
    masked_log_softmax,
    row_chunks,
)
from .select import Rule


def uniform(seed: int | None, stream: int, *key: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """A uniform per position; zeros, which nothing looks at, where nothing is random."""
    if seed is None:
        return torch.zeros(key[0].shape, dtype=finest_dtype(key[0].device), device=key[0].device)
    return counter_uniform(seed, torch.full_like(key[0], stream), *key)


def score_positions(
    denoiser: Denoiser,
    hidden_RD: Tensor,
    rule: Rule,
    law: Law,
    noise: Tensor,
    order: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor | None, Draws | None]:
    """Scores of the open positions; the statistic of adaptive rules; what is drawn there if the
    rule looks.
    """
    if not rule.needs_logits:
        return rule.score(None, None, order, offset), None, None
    if rule.needs_draw:
        return _score_draws(denoiser, hidden_RD, rule, law, noise, order, offset)
    scores = []
    statistics = []
    plain_RV = None
    for rows in row_chunks(len(hidden_RD), denoiser.vocab_size, chunk_elements(hidden_RD.device)):
        del plain_RV  # before the next chunk is made
        plain_RV = masked_log_softmax(denoiser.head(hidden_RD[rows]), denoiser.mask_id, 1.0)
        scores.append(rule.score(plain_RV, None, order[rows], offset[rows]))
        if rule.statistic:
            again = rule.statistic is rule.score
            statistics.append(
                scores[-1] if again else rule.statistic(plain_RV, None, order[rows], offset[rows])
            )
    return torch.cat(scores), torch.cat(statistics) if statistics else None, None


def _score_draws(
    denoiser: Denoiser,
    hidden_RD: Tensor,
    rule: Rule,
    law: Law,
    noise: Tensor,
    order: Tensor,
    offset: Tensor,
) -> tuple[Tensor, None, Draws]:
    """Every position's draw, scored by its probability at temperature 1 over every token."""
    scores = []
    drawn = []
    at_one = law.temperature in (0.0, 1.0) and not law.truncates
    for rows in law.chunks(hidden_RD, denoiser.vocab_size):
        logits = denoiser.head(hidden_RD[rows])
        draws = law.draw(logits, denoiser.mask_id, noise[rows])
        confidence = (
            confidence_at_one(logits, draws.tokens, draws.logps, denoiser.mask_id)
            if at_one
            else drawn_confidence(logits, draws.tokens)
        )
        drawn.append(draws)
        scores.append(rule.score(None, confidence, order[rows], offset[rows]))
    return torch.cat(scores), None, join(drawn)


def draw_tokens(denoiser: Denoiser, hidden_RD: Tensor, law: Law, noise: Tensor) -> Draws:
    """Tokens at these positions."""
    return join(
        [
            law.draw(denoiser.head(hidden_RD[rows]), denoiser.mask_id, noise[rows])
            for rows in law.chunks(hidden_RD, denoiser.vocab_size)
        ]
    )


def highest(
    scores: Float[Tensor, " R"],
    r: Tensor,
    c: Tensor,
    plan: Plan,
    sizes: Sizes,
    statistic: Tensor | None,
    rule: Rule,
    gamma: Tensor,
) -> Int[Tensor, " C"]:
    """Indices into the open positions of the ``count`` highest scores of each row; ties go to the
    left.

    An adaptive rule counts by its statistic instead, within what the plan leaves to it (all of the
    window, or of the exit).
    """
    # the table's columns are the window's open positions from the left, closed ones left out
    place = (plan.window.cumsum(-1) - 1)[r, c]
    shape = (sizes.rows, sizes.widest)
    table = torch.full(shape, float("-inf"), dtype=scores.dtype, device=scores.device)
    table[r, place] = scores
    order = table.argsort(dim=-1, descending=True, stable=True)
    columns = torch.arange(sizes.widest, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, columns)
    count = plan.count
    reveal = sizes.reveal
    if rule.prefix is not None and statistic is not None:
        values = torch.zeros_like(table)
        values[r, place] = statistic
        bold = rule.prefix(values.gather(-1, order), columns < plan.width[:, None], gamma).clamp(
            min=1
        )
        count = torch.where(plan.exits, count, torch.minimum(bold, count))
        reveal = int(count.sum())
    return places(rank[r, place] < count[r], reveal)[0]
