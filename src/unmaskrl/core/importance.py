"""Truncated importance weights: a surrogate's likelihood against the probability that tokens were
really drawn with.

    w_i = min(C, p_old(y_i | surrogate's canvas) / p_behavior(y_i | canvas it was drawn from))

per token, a constant for the gradient (DiFFPO, arXiv 2510.02212; the cap's value and the optional
self-normalisation are ours). Untruncated, E_behavior[w_i] = 1 exactly for rollouts of a fixed
number of calls without EOS; else close to 1, because whether token i counts (does an EOS come
before it?) and the range of 2-MF's tau depend on later draws. So ``is/mean`` that is not 1 is no
proof of a fault. They repair the token's conditional, not the distribution of the states.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NUM_QUARTILES = 4


def truncated_weights(
    old_logps: Float[Tensor, "B L"],
    behavior_logps: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    *,
    cap: float,
    normalise: bool = False,
) -> Float[Tensor, "B L"]:
    """w (B, L), 0 outside ``mask``; with ``normalise`` divided by their mean over the row's action
    tokens.
    """
    weights = (old_logps.detach() - behavior_logps).clamp(max=math.log(cap)).exp() * mask
    if normalise:
        mean = weights.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        weights = weights / mean.clamp(min=1e-12)
    return weights


def weight_sums(
    weights: Float[Tensor, "B L"],
    mask: Bool[Tensor, "B L"],
    progress: Float[Tensor, "B L"],
    cap: float,
    count: float,
) -> dict[str, Tensor]:
    """Sums over local tokens by the global ``count``, which add up over micro-batches and ranks;
    see ``summarise``.

    ``progress``: decoded_step / nfe in (0, 1], the share of the row's calls after which the token
    was there.
    """
    quartile = (progress * NUM_QUARTILES).ceil().clamp(1, NUM_QUARTILES)
    sums = {
        "is/mean": weights.sum(),
        "is/mean_square": (weights**2).sum(),
        "is/truncated": (mask & (weights >= cap * (1 - 1e-6))).sum(),
    }
    for q in range(1, NUM_QUARTILES + 1):
        inside = mask & (quartile == q)
        sums |= {f"is/mean_q{q}": (weights * inside).sum(), f"is/share_q{q}": inside.sum()}
    return {name: value.detach() / max(count, 1.0) for name, value in sums.items()}


def summarise(metrics: dict[str, float]) -> dict[str, float]:
    """Means by quartile of the row's calls and the effective share ESS / n = mean^2 / mean square,
    from added-up sums.
    """
    if "is/mean" not in metrics:
        return metrics
    result = {
        k: v for k, v in metrics.items() if not k.startswith(("is/share_q", "is/mean_square"))
    }
    result["is/ess"] = metrics["is/mean"] ** 2 / max(metrics["is/mean_square"], 1e-12)
    for q in range(1, NUM_QUARTILES + 1):
        result[f"is/mean_q{q}"] = metrics[f"is/mean_q{q}"] / max(metrics[f"is/share_q{q}"], 1e-12)
    return result


def progress_of(decoded_step: Tensor, nfe: Tensor) -> Float[Tensor, "B L"]:
    """decoded_step / nfe per token."""
    return decoded_step / torch.clamp(nfe, min=1)[:, None]
