"""Tokens at chosen rows: log-probabilities without the mask token, and inverse-CDF draws, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

# Elements of one (rows, V) block of logits: 16 MB in fp32. Rows, not vocabulary, are cut: each chunk is a whole softmax.
CHUNK_ELEMENTS = 2**22


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices over rows such that one chunk of logits has at most CHUNK_ELEMENTS elements (one row at least)."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def masked_log_softmax(logits: Tensor, mask_id: int, temperature: float) -> Float[Tensor, "R V"]:
    """log softmax(logits / T) over every token but the mask token, in fp32 at least; T = 0 scores at T = 1.

    The mask token is no answer: it gets probability 0 here, so that it can neither be drawn nor take probability from
    the tokens that can. Rollouts, likelihoods and position rules all use this one distribution.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0.0, 1.0):
        wide = wide / temperature
    blocked = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
    blocked[mask_id] = True
    return wide.masked_fill(blocked, float("-inf")).log_softmax(-1)


def inverse_cdf(logps_RV: Float[Tensor, "R V"], uniform: Float64[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The token v with CDF(v - 1) <= u < CDF(v); tokens of probability 0 are never drawn. CDF in fp64."""
    cdf = logps_RV.double().exp().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def draw(logps_RV: Float[Tensor, "R V"], temperature: float, uniform: Float64[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Greedy tokens at temperature 0, else inverse-CDF draws from ``logps_RV`` (already tempered)."""
    return logps_RV.argmax(-1) if temperature == 0.0 else inverse_cdf(logps_RV, uniform)


def drawn_confidence(logits: Float[Tensor, "R V"], token: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """log softmax(logits)[token] at temperature 1 with the mask token in the sum: what LLaDA's generate orders by.

    Leaving the mask token out here changes the order of near-ties, and with it the published greedy decodings.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.gather(-1, token[:, None]).squeeze(-1) - wide.logsumexp(-1)
