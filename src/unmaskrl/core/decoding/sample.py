"""Tokens at chosen rows: log-probabilities without the mask token, and inverse-CDF draws, in
bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from ..precision import finest

# Elements of one (rows, V) block of logits: 32 MB in fp32, the largest that glibc's malloc will
# reuse. Half of it costs a third more per row at V = 126,464, where each chunk reads the whole
# head. Rows are cut, not V: a chunk is a whole softmax.
CHUNK_ELEMENTS = 2**23
# On CUDA a chunk's tensors may take 1/128 of the card: logits in 16 bits, three copies in 32.
_CUDA_SHARE = 1 / 128
_CUDA_BYTES = 16
_CELL = 128


def chunk_elements(device: torch.device) -> int:
    """Most elements of a chunk of logits while decoding: by the card's memory on CUDA, the whole of
    it and not what is free, so that a run can be repeated.
    """
    if device.type != "cuda":
        return CHUNK_ELEMENTS
    return card_elements(torch.cuda.get_device_properties(device).total_memory)


def card_elements(memory: int) -> int:
    """``chunk_elements`` on a card of so many bytes."""
    return max(CHUNK_ELEMENTS, int(memory * _CUDA_SHARE) // _CUDA_BYTES)


def row_chunks(num_rows: int, vocab_size: int, elements: int | None = None) -> Iterator[slice]:
    """Slices over rows such that one chunk of logits has at most ``elements`` elements (None:
    CHUNK_ELEMENTS; one row at least).
    """
    size = max(1, (elements or CHUNK_ELEMENTS) // vocab_size)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def masked_log_softmax(logits: Tensor, mask_id: int, temperature: float) -> Float[Tensor, "R V"]:
    """log softmax(logits / T) over every token but the mask token, in fp32 at least; T = 0 scores
    at T = 1.

    The mask token is no answer: it gets probability 0 here, so that it can neither be drawn nor
    take probability from the tokens that can. Rollouts, likelihoods and position rules all use this
    one distribution.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if temperature not in (0.0, 1.0):
        wide = wide / temperature
    blocked = torch.zeros(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    blocked[mask_id] = float("-inf")
    # masked_fill takes longer than the softmax, and its backward pass copies
    return (wide + blocked).log_softmax(-1)


def inverse_cdf(logps_RV: Float[Tensor, "R V"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The token v with CDF(v - 1) <= u < CDF(v); tokens of probability 0 are never drawn. CDF in
    fp64 (``precision.finest``).

    In two steps, a cell of tokens and a token in it, so that only R V / 128 + R 128 numbers are
    summed up in fp64. A row that is NaN gives the last token, whose log-probability is NaN for
    ``decode`` to see: an index outside would be an assertion of the device, after which nothing
    runs on it.
    """
    mass = pad(logps_RV.exp(), (0, -logps_RV.shape[-1] % _CELL)).unflatten(-1, (-1, _CELL))
    cdf = finest(mass.sum(-1)).cumsum(-1)
    cell, before = _search(cdf, uniform[:, None] * cdf[:, -1:])
    chosen = mass[torch.arange(len(mass), device=mass.device), cell.squeeze(-1)]
    inside = finest(chosen).cumsum(-1)
    token, _ = _search(inside, before)
    return (cell * _CELL + token).squeeze(-1).clamp(max=logps_RV.shape[-1] - 1)


def _search(
    cdf: Float[Tensor, "R N"], target: Float[Tensor, "R 1"]
) -> tuple[Int[Tensor, "R 1"], Float[Tensor, "R 1"]]:
    """The first index with cdf > target (the last one with mass if there is none), and what of
    target lies in its cell.
    """
    total = cdf[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)
    return index, target - pad(cdf, (1, 0)).gather(-1, index)


def draw(
    logps_RV: Float[Tensor, "R V"], temperature: float, uniform: Float[Tensor, " R"]
) -> Int[Tensor, " R"]:
    """Greedy tokens at temperature 0, else inverse-CDF draws from ``logps_RV`` (already
    tempered).
    """
    # max and not argmax: the same first index in half the time
    return logps_RV.max(-1).indices if temperature == 0.0 else inverse_cdf(logps_RV, uniform)


def drawn_confidence(logits: Float[Tensor, "R V"], token: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """log softmax(logits)[token] at temperature 1 with the mask token in the sum: what LLaDA's
    generate orders by.

    Leaving the mask token out here changes the order of near-ties, and with it the published greedy
    decodings.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # finer near 0 than logit - logsumexp, and faster
    return wide.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)


def confidence_at_one(
    logits: Float[Tensor, "R V"], token: Int[Tensor, " R"], logps: Float[Tensor, " R"], mask_id: int
) -> Float[Tensor, " R"]:
    """``drawn_confidence`` without another softmax, from the token's ``masked_log_softmax`` at
    temperature 1.

    log p - log(1 + exp(l_mask - Z)), where Z = l_token - log p is the log-sum-exp without the mask
    token.
    """
    log_sum = logits.gather(-1, token[:, None]).squeeze(-1) - logps
    return logps + logsigmoid(log_sum - logits[:, mask_id])
