"""A tiny model and finished rollouts of every kind, for checkers to try a part on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.canvas import anchored_canvas
from ..core.decoding import decode
from ..core.types import Rollout, first_eos_mask
from ..models.denoiser import ModelDenoiser
from ..models.families.llada import LLaDA, LLaDAConfig


def seeded(seed: int) -> torch.Generator:
    """A generator of the checker's own."""
    return torch.Generator().manual_seed(seed)


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 3) -> ModelDenoiser:
    """A random LLaDA of 11 ordinary tokens (mask 11, EOS 12, pad 13); EOS is drawn now and then."""
    config = LLaDAConfig(
        d_model=16,
        n_heads=4,
        n_kv_heads=2,
        n_layers=2,
        mlp_hidden_size=24,
        vocab_size=14,
        embedding_size=16,
        mask_token_id=11,
        eos_token_id=12,
        pad_token_id=13,
    )
    model = LLaDA(config).init_weights(seeded(seed), std=0.6)
    return ModelDenoiser.from_model(model.to(dtype).eval())


def hand_made(denoiser: ModelDenoiser) -> Rollout:
    """Left pads; rows that are free, anchored, ended early, ended with an anchor behind, without a
    free token, with an exit, and empty.
    """
    end = denoiser.eos_id
    completion = torch.tensor(
        [
            [1, 2, 3, 4],
            [1, 2, 3, 4],
            [1, end, end, end],
            [1, end, 3, end],
            [1, 2, 3, 4],
            [1, 2, 3, 4],
            [end, end, end, end],
        ]
    )
    step = torch.tensor(
        [
            [1, 2, 3, 4],
            [0, 1, 0, 2],
            [1, 2, 3, 3],
            [1, 2, 0, 3],
            [0, 0, 0, 0],
            [1, 2, 3, 3],
            [1, 2, 2, 2],
        ]
    )
    return _finished(denoiser, completion, step, torch.tensor([0, 0, 0, 0, 0, 3, 0]))


def decoded(denoiser: ModelDenoiser) -> Rollout:
    """Anchored and blank rows as decoding leaves them, some with an exit, some ended early."""
    canvas = anchored_canvas(
        [[1, 2, 3, 4], [5], [6, 7]] * 4,
        [{}, {0: 2, 3: 3}, {5: 1}] * 4,
        gen_length=6,
        denoiser=denoiser,
    )
    return decode(
        denoiser,
        canvas,
        block_length=3,
        steps=6,
        select="entropy",
        temperature=1.0,
        exit_at=0.7,
        generator=seeded(1),
    )


def _finished(
    denoiser: ModelDenoiser, completion: Tensor, step: Tensor, exit_step: Tensor
) -> Rollout:
    """Two pads, a prompt of three tokens and the completion; decoded_step 0 is an anchor."""
    rows, gen_length = completion.shape
    pads = 2
    before = pads + 3
    prompt = torch.zeros(rows, before, dtype=torch.int64)
    prompt[:, :pads] = denoiser.pad_id
    ids = torch.cat([prompt, completion], 1)
    column = torch.arange(ids.shape[1]).expand(rows, -1)
    return Rollout(
        ids=ids,
        prompt_mask=(column >= pads) & (column < before),
        completion_mask=first_eos_mask(ids, gen_length, denoiser.eos_id),
        attention_mask=column >= pads,
        decoded_step=torch.cat([torch.zeros_like(prompt), step], 1),
        behavior_logps=torch.zeros(ids.shape),
        nfe=step.amax(-1),
        exit_step=exit_step,
        row_ids=torch.arange(rows),
        group_ids=torch.zeros(rows, dtype=torch.int64),
        gamma=torch.zeros(rows, dtype=torch.float64),
        gen_length=gen_length,
        temperature=1.0,
        exact=True,
    )
