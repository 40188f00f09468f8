"""What decoding and scoring block by block ask of a denoiser that states a ``block_length``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.block_causal import BlockCausal, block_positions, block_visible
from .require import close, require

_BLOCKS = 3


def check_block_causal(denoiser: Any, ordinary: Tensor) -> None:
    """AssertionError unless earlier blocks do not see later ones, a stated visibility is kept to,
    and a cache changes nothing.

    ``ordinary``: two ids or more that canvases are filled with, on the denoiser's device.
    """
    block: int = denoiser.block_length
    require(
        isinstance(denoiser, BlockCausal),
        f"block_length is {block}, and hidden_under or new_cache is missing",
    )
    require(block >= 1, f"block_length is {block}; expected at least 1, or None: full attention")
    places = torch.arange(2 * _BLOCKS * block, device=ordinary.device).view(2, -1)
    ids = ordinary[(places * 5 + 1) % len(ordinary)]
    ids = torch.where(places % 3 == 2, denoiser.mask_id, ids)
    hidden = denoiser.hidden(ids)
    _check_later_blocks(denoiser, ids, hidden, ordinary)
    _check_visibility(denoiser, ids, hidden)
    _check_cache(denoiser, ids, hidden)


def _check_later_blocks(denoiser: Any, ids: Tensor, hidden: Tensor, ordinary: Tensor) -> None:
    block: int = denoiser.block_length
    for column in (block, ids.shape[1] - 1):
        edited = ids.clone()
        edited[:, column] = torch.where(ids[:, column] == ordinary[0], ordinary[1], ordinary[0])
        edge = column // block * block
        require(
            close(denoiser.hidden(edited)[:, :edge], hidden[:, :edge]),
            f"the token at position {column} changes what is said about a block before its own "
            f"(block_length {block})",
        )


def _check_visibility(denoiser: Any, ids: Tensor, hidden: Tensor) -> None:
    seen = torch.ones_like(ids, dtype=torch.bool)
    positions = block_positions(seen)
    blocks = positions // denoiser.block_length
    visible = block_visible(blocks, blocks, seen)
    require(
        close(denoiser.hidden_under(ids, positions, visible), hidden),
        "hidden_under with the visibility of blocks is not hidden",
    )
    order = torch.arange(ids.shape[1], device=ids.device).flip(0)
    turned = denoiser.hidden_under(
        ids[:, order], positions[:, order], visible[:, order][:, :, order]
    )
    require(
        close(turned[:, order], hidden),
        "hidden_under goes by columns: it must go by the positions and the visibility it is given",
    )
    visible[:, 0] = False
    blind = denoiser.hidden_under(ids, positions, visible)
    require(bool(blind.isfinite().all()), "a token that sees nothing has no finite hidden states")


def _check_cache(denoiser: Any, ids: Tensor, hidden: Tensor) -> None:
    """Block by block: first all masks, then as it is; each behind the cached ones."""
    rows, length = ids.shape
    block: int = denoiser.block_length
    cache = denoiser.new_cache(rows, length)
    columns = torch.arange(length, device=ids.device).expand(rows, -1)
    blocks = columns // block
    for start in range(0, length, block):
        own = slice(start, start + block)
        visible = blocks[:, None, :] <= blocks[:, own, None]
        at = columns[:, own]
        masks = torch.full_like(ids[:, own], denoiser.mask_id)
        denoiser.hidden_under(masks, at, visible, cache, at)
        kept = denoiser.hidden_under(ids[:, own], at, visible, cache, at)
        require(
            close(kept, hidden[:, own]),
            f"block {start // block} behind a cache is not what it is without one: a call must "
            "write its keys and values at the columns it is given, over those of earlier calls",
        )
