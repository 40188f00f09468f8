"""Any-order estimators on an explicit joint, enumerated: no sampling, all completions at once.

A set of positions is a number (bit k = position k). ``table[M, i]`` (N,) holds a_i(M) = log p(y_i |
y outside M) in nats, for each of the N completions; an estimator is the list of its outcomes,
(probability, value (N,)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Outcomes = list[tuple[float, Tensor]]


def conditional_logps(
    log_weights: Float[Tensor, " N"],
    num_tokens: int,
    length: int,
    tilt: Float[Tensor, "S L V"] | None = None,
) -> Float[Tensor, "S L N"]:
    """a_i(M) for each set M (S = 2**length of them) and i in M, 0 elsewhere; ``tilt`` as in
    ``unmaskrl.core.toy``.
    """
    grid = log_weights.log_softmax(-1).reshape([num_tokens] * length)
    table = torch.zeros(2**length, length, num_tokens**length, dtype=log_weights.dtype)
    for hidden in range(2**length):
        for i in members(hidden):
            others = [k for k in members(hidden) if k != i]
            logits = grid.logsumexp(others, keepdim=True) if others else grid
            if tilt is not None:
                logits = logits + tilt[hidden, i].reshape(
                    [num_tokens if k == i else 1 for k in range(length)]
                )
            table[hidden, i] = logits.log_softmax(i).expand(grid.shape).flatten()
    return table


def members(code: int) -> list[int]:
    """Positions of a set."""
    return [k for k in range(code.bit_length()) if code >> k & 1]


def code_of(positions: Iterable[int]) -> int:
    """The number of a set."""
    return sum(1 << k for k in positions)


def score(table: Tensor, hidden: Iterable[int], scored: Iterable[int]) -> Float[Tensor, " N"]:
    """sum over ``scored`` of log p(y_i | ``hidden`` masked)."""
    return table[code_of(hidden), list(scored)].sum(0)


def elbo_outcomes(table: Tensor, free: Sequence[int], exits: Sequence[int] = ()) -> Outcomes:
    """``estimators.elbo`` with one draw: (r/n) sum_{i in M} a_i(M + E), n ~ U{1..r}, M in R = free;
    and the exit view of E.
    """
    last = score(table, exits, exits)
    r = len(free)
    if r == 0:
        return [(1.0, last)]
    return [
        (p, r / len(m) * score(table, (*m, *exits), m) + last)
        for p, m in subsets(free, range(1, r + 1))
    ]


def drawn_in_all(
    table: Tensor, free: Sequence[int], anchors: Sequence[int], *, hide: bool
) -> Outcomes:
    """Masks of n ~ U{1..c} of all c tokens, weight c / n on the free ones among them; anchors
    hidden as drawn, or never.

    ``hide=True`` is ``elbo(hide_anchors=True)``, ``hide=False`` the masks of STP's code.
    """
    both = sorted((*free, *anchors))
    result = []
    for p, m in subsets(both, range(1, len(both) + 1)):
        scored = [i for i in m if i in free]
        result.append((p, len(both) / len(m) * score(table, m if hide else scored, scored)))
    return result


def truncated_outcomes(table: Tensor, free: Sequence[int], e: int) -> Outcomes:
    """All but the last e tokens of a random order: (f-e)/n sum_{i in M} a_i(M), n ~ U{e+1..f}."""
    f = len(free)
    return [
        (p, (f - e) / len(m) * score(table, m, m)) for p, m in subsets(free, range(e + 1, f + 1))
    ]


def exit_outcomes(table: Tensor, free: Sequence[int], e: int) -> Outcomes:
    """A random set of e tokens, scored in one pass, weight 1."""
    return [(p, score(table, m, m)) for p, m in subsets(free, [e])]


def single_draw_outcomes(table: Tensor, free: Sequence[int], e: int) -> Outcomes:
    """One draw for both: n ~ U{e..f}, weight (f-e+1)/n, and (f-e+1) where n = e stands for the
    exit.
    """
    f = len(free)
    result = []
    for p, m in subsets(free, range(e, f + 1)):
        result.append((p, (f - e + 1) * (1 if len(m) == e else 1 / len(m)) * score(table, m, m)))
    return result


def subsets(free: Sequence[int], counts: Sequence[int]) -> list[tuple[float, tuple[int, ...]]]:
    """(probability, set): a uniform count, then a uniform subset of that size."""
    return [
        (1 / (len(counts) * math.comb(len(free), n)), subset)
        for n in counts
        for subset in itertools.combinations(free, n)
    ]


def moments(outcomes: Outcomes) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Mean and variance of an estimator for each completion."""
    probs = torch.tensor([p for p, _ in outcomes], dtype=torch.float64)[:, None]
    values = torch.stack([v for _, v in outcomes]).double()
    mean = (probs * values).sum(0)
    return mean, (probs * (values - mean) ** 2).sum(0)


def order_elbo(table: Tensor, free: Sequence[int], *, stop: int = 0) -> Float[Tensor, " N"]:
    """The oracle: mean over orders of ``free`` of the log-probs of its tokens one by one, but for
    the last ``stop`` of them.
    """
    total = torch.zeros(table.shape[-1], dtype=table.dtype)
    orders = list(itertools.permutations(free))
    for order in orders:
        for k in range(len(order) - stop):
            total = total + table[code_of(order[k:]), order[k]]
    return total / len(orders)


def growth(f: int) -> float:
    """g(f) = f (H_f - 1) / (f - 1), and g(1) = 0: the variance of the ELBO per unit of spread of
    context-free losses.
    """
    return truncated_growth(f, 0)


def truncated_growth(f: int, e: int) -> float:
    """(f - e)(H_f - H_e - (f - e)/f) / (f - 1): the same for the draws that spare an exit set of e
    tokens.
    """
    if f == 1:
        return 0.0
    return (f - e) * (sum(1 / k for k in range(e + 1, f + 1)) - (f - e) / f) / (f - 1)
