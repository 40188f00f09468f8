"""The loss of supervised training: cross-entropy of masked tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from ...core.block_causal import (
    BlockCausal,
    block_length_of,
    block_positions,
    hidden_beside_clean,
    tail_mask,
)
from ...core.decoding.sample import row_chunks
from ...core.denoiser import Denoiser
from ...core.estimators.base import block_sizes, smallest_in_blocks, uniform_count


def masked_loss(
    denoiser: Denoiser,
    prompts: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    completions: Int[Tensor, "B G"],
    generator: torch.Generator,
    own: slice = slice(None),
) -> Float[Tensor, ""]:
    """Mean over rows of the mean cross-entropy (nats per token) over n masked tokens, n ~ U{1..G},
    stratified over rows.

    Block-causal denoisers: the same in every block of c completion tokens, n ~ U{1..c}, with blocks
    before it clean; the mean over blocks is weighted by c (BD3-LM, arXiv 2503.09573). Of the
    ``own`` rows: the losses of parts of a batch sum to that of the whole, masks included.
    """
    if block_length_of(denoiser) is not None:
        return _block_loss(denoiser, prompts, prompt_mask, completions, generator, own)
    batch, gen_length = completions.shape
    share = (torch.arange(batch) + torch.rand((), generator=generator)) / batch
    count = 1 + (share * gen_length).long().clamp(max=gen_length - 1)
    rank = (
        torch.rand(batch, gen_length, generator=generator, dtype=torch.float64)
        .argsort(-1)
        .argsort(-1)
    )
    count = count[own].to(completions.device)
    masked = rank[own].to(completions.device) < count[:, None]
    prompts = prompts[own]
    prompt_mask = prompt_mask[own]
    completions = completions[own]
    ids = torch.cat([prompts, torch.where(masked, denoiser.mask_id, completions)], 1)
    attention = torch.cat([prompt_mask, torch.ones_like(masked)], 1)
    hidden = denoiser.hidden(ids, None if bool(attention.all()) else attention)[:, -gen_length:]
    weight = (1.0 / count / batch)[:, None].expand_as(masked)[masked]
    return _cross_entropy(denoiser, hidden[masked], completions[masked], weight)


def _block_loss(
    denoiser: Denoiser,
    prompts: Tensor,
    prompt_mask: Tensor,
    completions: Tensor,
    generator: torch.Generator,
    own: slice,
) -> Tensor:
    length = block_length_of(denoiser)
    assert isinstance(denoiser, BlockCausal) and length is not None
    batch, gen_length = completions.shape
    first = prompts.shape[1]
    attention = pad(prompt_mask, (0, gen_length), value=True)
    tail = tail_mask(attention, length)
    attention = torch.cat([attention, tail], 1)
    candidates = torch.zeros_like(attention)
    candidates[:, first : first + gen_length] = True
    blocks = block_positions(attention) // length
    size = block_sizes(candidates, blocks)
    draws = torch.rand(2, *blocks.shape, generator=generator, dtype=torch.float64)
    share, keys = draws.to(completions.device)
    share = (torch.arange(batch, device=share.device)[:, None] + share.gather(1, blocks)) / batch
    # rows are strata; the next block of a row is in the next stratum
    share = (share + blocks / batch) % 1
    count = uniform_count(share, size)
    masked = smallest_in_blocks(keys, candidates, count, blocks)[own]
    weight = (size / count / gen_length / batch)[own]
    end = torch.full_like(tail, denoiser.mask_id, dtype=completions.dtype)
    clean = torch.cat([prompts, completions, end], 1)[own]
    noisy = torch.where(masked, denoiser.mask_id, clean)
    hidden = hidden_beside_clean(denoiser, noisy[:, None], clean, attention[own], first)[:, 0]
    # all that is masked lies behind ``first``
    return _cross_entropy(denoiser, hidden[masked[:, first:]], clean[masked], weight[masked])


def _cross_entropy(
    denoiser: Denoiser,
    hidden_RD: Float[Tensor, "R D"],
    targets: Int[Tensor, " R"],
    weight: Float[Tensor, " R"],
) -> Float[Tensor, ""]:
    total = hidden_RD.new_zeros(())
    for rows in row_chunks(len(targets), denoiser.vocab_size):
        logits = denoiser.head(hidden_RD[rows])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(wide, targets[rows], reduction="none")
        total = total + (loss * weight[rows].to(loss.dtype)).sum()
    return total
