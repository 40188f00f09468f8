"""From a canvas to what a server is asked, and from its rows to a Rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.block_causal import completed
from ...core.decoding.law import Law
from ...core.denoiser import end_ids
from ...core.precision import finest_dtype
from ...core.rng import named_seed
from ...core.types import Canvas, Rollout, completion_columns, first_eos_mask
from .answers import Row, spans

_SEEDS = 2**31  # a server's seed is a whole number of 32 bits with a sign


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompts of a canvas, and how many tokens end each row's last block."""

    prompts: list[list[int]]
    counts: list[int]
    seeds: list[int]

    @classmethod
    def of(cls, canvas: Canvas, block: int, seed: int) -> Asked:
        """``seed`` is the step's; a row's own follows from it and the row's id."""
        prompts = [
            ids[mask].tolist() for ids, mask in zip(canvas.ids, canvas.prompt_mask, strict=True)
        ]
        counts = [
            canvas.gen_length + -(len(prompt) + canvas.gen_length) % block for prompt in prompts
        ]
        seeds = [named_seed(seed, "row", row) % _SEEDS for row in canvas.row_ids.tolist()]
        return cls(prompts, counts, seeds)


def to_rollout(
    canvas: Canvas, rows: Sequence[Row], denoiser: Any, *, law: Law, gamma: float
) -> Rollout:
    """What the server decoded, as ``decode`` records it; not exact, because a server chooses
    positions by the tokens that it drew.

    Without step maps every block counts as one call. What is not there behind an end token was
    never revealed.
    """
    block = denoiser.block_length
    whole = completed(canvas, block, denoiser.mask_id, denoiser.pad_id)
    start = whole.ids.shape[1] - whole.gen_length
    device = canvas.ids.device
    ids = whole.ids.cpu().clone()
    steps = torch.zeros_like(ids)
    logps = torch.zeros(ids.shape)
    nfe = torch.zeros(len(rows), dtype=torch.int64)
    open_mask = (whole.attention_mask & ~whole.prompt_mask).cpu()
    prompts = canvas.prompt_mask.sum(-1).tolist()
    for i, row in enumerate(rows):
        decoded = global_steps(row.steps, len(row.ids), prompts[i], block)
        end = start + len(row.ids)
        nfe[i] = max(decoded)
        ids[i, start:end] = torch.tensor(row.ids)
        steps[i, start:end] = torch.tensor(decoded)
        if row.logps is not None:
            logps[i, start:end] = torch.tensor(row.logps)
        rest = open_mask[i].clone()
        rest[:end] = False
        ids[i, rest] = denoiser.eos_id
        steps[i, rest] = nfe[i] + 1
    ids = ids.to(device)
    zeros = torch.zeros_like(nfe)
    return Rollout(
        ids=ids,
        prompt_mask=whole.prompt_mask,
        completion_mask=first_eos_mask(ids, whole.gen_length, *end_ids(denoiser))
        & ~completion_columns(ids, whole.gen_length - canvas.gen_length),
        attention_mask=whole.attention_mask,
        decoded_step=steps.to(device),
        behavior_logps=logps.to(device),
        nfe=nfe.to(device),
        exit_step=zeros.to(device),
        row_ids=whole.row_ids,
        group_ids=whole.group_ids,
        gamma=torch.full((len(rows),), gamma, dtype=finest_dtype(device), device=device),
        gen_length=whole.gen_length,
        temperature=law.temperature,
        top_k=law.top_k,
        top_p=law.top_p,
        exact=False,
        pieces=getattr(denoiser, "pieces", None),
        block_length=block,
    )


def global_steps(local: list[int] | None, count: int, prompt: int, block: int) -> list[int]:
    """The row's call that revealed each token, from the call of its block; blocks follow each
    other.
    """
    result: list[int] = []
    before = 0
    for at, end in spans(count, prompt, block):
        own = [1] * (end - at) if local is None else local[at:end]
        result += [before + step for step in own]
        before += max(own)
    return result
