"""An estimator of your own: the ELBO of decoding block by block.

Rollouts are decoded in blocks: any order inside a block, the blocks from left to right. ``elbo``
takes any order of the whole completion, so its views also hide tokens of early blocks behind
visible later ones, which decoding never sees. Here block b is scored as it was decoded: earlier
blocks are visible, later ones hidden. With f_b action tokens in the block, n ~ U{1..f_b} and a
uniform n-subset M of them,

    L = sum_b (f_b / n) * sum_{i in M} log p(y_i | q, blocks before b, block b without M)

is unbiased for the mean over all orders that go block by block. Nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmaskrl import Estimator, Rollout, Views
from unmaskrl.core.estimators.base import (
    ONLY,
    Update,
    mask_view,
    position_uniform,
    row_uniform,
    smallest,
    stack_views,
    uniform_count,
    weighted_sum,
)
from unmaskrl.core.rng import draw_seed

# what a uniform is drawn for, a part of its key
COUNT = 0
SUBSET = 1


def block_elbo(*, block_length: int, num_mc: int = 1) -> Estimator:
    """``num_mc`` views of every block (one more where an exit filled tokens).

    ``block_length`` is that of decoding. With 1 this is ``left_to_right``, with the whole length a
    plain ``elbo``.
    """
    if block_length < 1 or num_mc < 1:
        raise ValueError(f"expected at least 1: block_length {block_length}, num_mc {num_mc}")

    def num_blocks(gen_length: int) -> int:
        return -(-gen_length // block_length)

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        seed = draw_seed(generator)
        exits = rollout.exit_mask
        block = block_numbers(rollout, block_length)
        ids = []
        weights = []
        for b in range(num_blocks(rollout.gen_length)):
            inside = rollout.action_mask & ~exits & (block == b)
            later = rollout.action_mask & (block > b)
            size = inside.sum(-1)
            for k in range(num_mc):
                # counts of a row are stratified; keys by row: the same draws in any batch
                share = (row_uniform(rollout, seed, COUNT, b, k) + k) / num_mc
                count = uniform_count(share, size)
                keys = position_uniform(rollout, seed, SUBSET, b, k)
                subset = smallest(keys, inside, count)
                ids.append(mask_view(rollout, subset | later | exits, mask_id))
                weights.append(subset * (size / (count * num_mc))[:, None])
        if bool(exits.any()):  # filled in one call that saw all the others
            ids.append(mask_view(rollout, exits, mask_id))
            weights.append(exits.double())
        return stack_views(ids, weights)

    def fits(gen_length: int, decoded_in: int, calls: int) -> None:
        if block_length != decoded_in:
            raise ValueError(
                f"estimator.block_length is {block_length}, but rollouts are decoded in blocks of "
                f"{decoded_in}; set it to decode.block_length"
            )

    return Estimator(
        make_views,
        weighted_sum,
        lambda gen_length, nfe, has_exit: num_blocks(gen_length) * num_mc + has_exit,
        fits=fits,
    )


def block_numbers(rollout: Rollout, block_length: int) -> Tensor:
    """(L,) The block of each column of the canvas, from 0; negative in the prompt."""
    length = rollout.ids.shape[1]
    offset = torch.arange(length, device=rollout.ids.device) - (length - rollout.gen_length)
    return offset.div(block_length, rounding_mode="floor")
