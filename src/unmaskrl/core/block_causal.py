"""Block-causal denoisers (BD3-LM, arXiv 2503.09573; SDAR, LLaDA2): a token sees another if the
other's block is not later.

Blocks of ``block_length`` tokens are counted from each row's first real token, pads apart, so that
a prompt may share its last block with the first tokens of its completion. What is decided in a
block never changes what was computed for earlier ones, which gives two exact savings:

- decoding runs the active block alone over cached keys and values (``CachedBlocks``);
- scoring runs every block at once, each seeing the blocks before it clean
  (``hidden_beside_clean``), on the doubled sequence [noisy ; clean]:

    noisy token -> its own block of the noisy half, earlier blocks of the clean half
    clean token -> its own and earlier blocks of the clean half

  Several noisy canvases of one row share its clean half, and with it the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from .denoiser import Denoiser
from .types import Canvas, block_positions


@runtime_checkable
class BlockCausal(Denoiser, Protocol):
    """A denoiser whose ``block_length`` is a number (None: full attention)."""

    @property
    def block_length(self) -> int | None: ...

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Any = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states of T tokens of which token t sees token s where ``visible[b, t, s]``.

        ``positions`` may repeat. With ``cache`` the tokens' keys and values are first written to
        its ``columns``, and s counts the cache's columns. A token that sees nothing gives finite
        numbers, which mean nothing.
        """
        ...

    def new_cache(self, rows: int, columns: int) -> Any:
        """Room for the keys and values of ``rows`` x ``columns`` tokens, with a method
        ``keep(index)`` that drops all other rows.
        """
        ...


def block_length_of(denoiser: Denoiser) -> int | None:
    """Tokens per block of a block-causal denoiser, None for full attention."""
    return getattr(denoiser, "block_length", None)


def block_visible(
    query_blocks: Int[Tensor, "B T"], key_blocks: Int[Tensor, "B S"], real: Bool[Tensor, "B S"]
) -> Bool[Tensor, "B T S"]:
    """Keys that are no pads and whose block is not later than the query's."""
    return real[:, None] & (key_blocks[:, None] <= query_blocks[..., None])


def tail_mask(attention_mask: Bool[Tensor, "B L"], block_length: int) -> Bool[Tensor, "B E"]:
    """Which of ``block_length`` - 1 columns behind the canvas complete each row's last block."""
    missing = -attention_mask.sum(-1, keepdim=True) % block_length
    return torch.arange(block_length - 1, device=missing.device) < missing


def completed(canvas: Canvas, block_length: int, mask_id: int, pad_id: int) -> Canvas:
    """The canvas with ``block_length`` - 1 more columns, in which every row's last block is whole.

    The models are trained on whole blocks: what lies beyond ``gen_length`` is decoded with the
    rest of its block and is no part of the completion. Columns after that are pads, on the right.
    Their number depends on no row, so that a row is the same in any batch.
    """
    extra = block_length - 1
    inside = tail_mask(canvas.attention_mask, block_length)
    return replace(
        canvas,
        ids=torch.cat([canvas.ids, torch.where(inside, mask_id, pad_id)], 1),
        prompt_mask=pad(canvas.prompt_mask, (0, extra)),
        fixed_mask=pad(canvas.fixed_mask, (0, extra)),
        attention_mask=torch.cat([canvas.attention_mask, inside], 1),
        gen_length=canvas.gen_length + extra,
    )


@dataclass(slots=True)
class CachedBlocks:
    """Hidden states at the active block of each row, over the keys and values of the blocks before.

    A row's first call sees its canvas up to the active block. Later calls run that block alone; in
    the first call after a block was finished, the finished block is run with it, now clean, and
    what was stored for it while it held masks is overwritten. So a row costs its prompt, then
    ``block_length`` tokens per call and as many per finished block; no call is added.
    """

    denoiser: BlockCausal
    block_length: int
    positions: Int[Tensor, "B L"]
    real: Bool[Tensor, "B L"]
    first: Int[Tensor, " B"]  # column of each row's first real token
    last: Int[Tensor, " B"]  # its active block in the call before
    rows: Int[Tensor, " A"] | None = None  # in the cache, ascending
    cache: Any = None

    @classmethod
    def of(cls, denoiser: BlockCausal, block_length: int, attention_mask: Tensor) -> CachedBlocks:
        """Nothing is run yet."""
        first = attention_mask.long().argmax(-1)
        return cls(
            denoiser=denoiser,
            block_length=block_length,
            positions=block_positions(attention_mask),
            real=attention_mask,
            first=first,
            last=torch.zeros_like(first),
        )

    def reach(self, block: Int[Tensor, " B"]) -> list[Int[Tensor, " B"]]:
        """Blocks that each row finished in the call before, and the column behind its active
        block: ``start`` and ``go_on`` want their maxima over the rows that they run.
        """
        return [block - self.last, self.first + (block + 1) * self.block_length]

    def start(
        self, ids: Int[Tensor, "A L"], rows: Int[Tensor, " A"], block: Int[Tensor, " A"], end: int
    ) -> Float[Tensor, "A S D"]:
        """The first call: every column up to the end of the last active block."""
        columns = torch.arange(end, device=ids.device).expand(len(rows), -1)
        self.cache = self.denoiser.new_cache(len(rows), ids.shape[1])
        self.rows = rows
        self.last[rows] = block
        return self._run(ids, rows, columns, end)

    def go_on(
        self,
        ids: Int[Tensor, "A L"],
        rows: Int[Tensor, " A"],
        block: Int[Tensor, " A"],
        behind: int,
        end: int,
    ) -> Float[Tensor, "A T D"]:
        """A later call, of rows that were in the call before: hidden states at the active block."""
        assert self.rows is not None
        if len(rows) < len(self.rows):
            self.cache.keep(torch.searchsorted(self.rows, rows))
            self.rows = rows
        steps = torch.arange(-behind, 1, device=ids.device)
        # a row that finished fewer runs its last one again, with the same result
        blocks = torch.maximum(block[:, None] + steps, self.last[rows][:, None])
        inside = torch.arange(self.block_length, device=ids.device)
        columns = self.first[rows][:, None, None] + blocks[..., None] * self.block_length + inside
        self.last[rows] = block
        hidden = self._run(ids, rows, columns.flatten(1), end)
        return hidden[:, -self.block_length :]

    def column(self, rows: Tensor, block: Tensor) -> Int[Tensor, " A"]:
        """The first column of these blocks."""
        return self.first[rows] + block * self.block_length

    def _run(self, ids: Tensor, rows: Tensor, columns: Tensor, end: int) -> Tensor:
        positions = self.positions[rows]
        chosen = positions.gather(1, columns)
        blocks = positions[:, :end] // self.block_length
        visible = block_visible(chosen // self.block_length, blocks, self.real[rows, :end])
        return self.denoiser.hidden_under(
            ids.gather(1, columns), chosen, visible, self.cache, columns
        )


def hidden_beside_clean(
    denoiser: BlockCausal,
    noisy: Int[Tensor, "B K L"],
    clean: Int[Tensor, "B L"],
    attention_mask: Bool[Tensor, "B L"],
    first: int,
) -> Float[Tensor, "B K T D"]:
    """Hidden states of the noisy tokens from column ``first`` on, where completions begin: every
    block sees itself noisy and all blocks before it clean, in one pass (differentiable).

    K noisy canvases share one clean one: none sees another, so each is as it would be alone.
    """
    length = denoiser.block_length
    assert length is not None
    copies = noisy.shape[1]
    # from where the block may begin that a prompt shares with its completion
    start = max(0, first - length + 1)
    positions = block_positions(attention_mask)
    blocks = positions // length
    own = blocks[:, start:]
    real = attention_mask[:, start:]
    ids = torch.cat([noisy[..., start:].flatten(1), clean], 1)
    earlier = attention_mask[:, None] & (blocks[:, None] < own[..., None])
    same = real[:, None] & (own[:, None] == own[..., None])
    itself = torch.eye(copies, dtype=torch.bool, device=ids.device)[:, None, :, None]
    alone = (itself & same[:, None, :, None]).flatten(3).flatten(1, 2)
    of_noisy = torch.cat([alone, earlier.repeat(1, copies, 1)], -1)
    of_clean = pad(block_visible(blocks, blocks, attention_mask), (alone.shape[1], 0))
    hidden = denoiser.hidden_under(
        ids,
        torch.cat([positions[:, start:].repeat(1, copies), positions], 1),
        torch.cat([of_noisy, of_clean], 1),
    )
    return hidden[:, : alone.shape[1]].unflatten(1, (copies, -1))[:, :, first - start :]
