"""Rollouts of a block-causal toy with prompts of every length, and what rows are worth alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.conftest import rounded, seeded
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.toy import BlockToy
from unmaskrl.core.types import Rollout

PROMPTS = [[1], [1, 2], [2, 1, 1], [1, 2, 1, 2], [2, 2, 1, 0, 1, 2, 1]]
SIZE = 100.0  # of sums of the toy's logits


def toy(block_length: int, **options: Any) -> BlockToy:
    return BlockToy(seeded(0), block_length=block_length, max_length=32, **options)


def decoded(den: BlockToy, select: str = "entropy", gen_length: int = 9, **options: Any) -> Rollout:
    canvas = blank_canvas(PROMPTS, gen_length=gen_length, denoiser=den)
    settings: dict[str, Any] = {"steps": gen_length, "temperature": 1.0, **options}
    if select == "eb":
        settings.setdefault("gamma", 0.5)
    return decode(
        den,
        canvas,
        block_length=den.block_length or 0,
        select=select,
        generator=seeded(3),
        **settings,
    )


def compact(rollout: Rollout, row: int) -> tuple[list[int], list[int], int]:
    """Ids and calls of a row without its pads, and the length of its prompt."""
    real = rollout.attention_mask[row]
    return (
        rollout.ids[row, real].tolist(),
        rollout.decoded_step[row, real].tolist(),
        int(rollout.prompt_mask[row].sum()),
    )


def logps_of(den: BlockToy, ids: list[int]) -> Tensor:
    """log p of every token at every position of one row: the mask token can not be drawn."""
    logits = den.logits(torch.tensor([ids]))[0].clone()
    logits[:, den.mask_id] = float("-inf")
    return logits.log_softmax(-1)


def equal(ours: Tensor, theirs: Tensor) -> None:
    for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
        assert a == rounded(b, size=SIZE, dtype=torch.float64)


def exact_elbo(den: BlockToy, rollout: Rollout, row: int) -> float:
    """The mean over all orders within each block, by subsets; what the block's exit filled comes
    last and at once.
    """
    ids, _, prompt = compact(rollout, row)
    exits = rollout.exit_mask[row, rollout.attention_mask[row]].nonzero().squeeze(-1).tolist()
    end = prompt + 4  # the completion, without the cut part of its last block
    length = den.block_length or 0
    total = 0.0
    for block in range(prompt // length, -(-end // length)):
        places = [i for i in range(block * length, (block + 1) * length) if prompt <= i < end]
        last = [i for i in places if i in exits]
        places = [i for i in places if i not in exits]
        hidden = [*range(end, (block + 1) * length), *last]
        draws = [(last, 1.0)] if last else []
        for n in range(1, len(places) + 1):
            subsets = list(itertools.combinations(places, n))
            draws += [(list(subset), 1 / n / len(subsets)) for subset in subsets]
        for subset, weight in draws:
            seen = [
                den.mask_id if i in subset or i in hidden else ids[i]
                for i in range((block + 1) * length)
            ]
            logps = logps_of(den, seen)
            total += weight * sum(float(logps[i, ids[i]]) for i in subset)
    return total
