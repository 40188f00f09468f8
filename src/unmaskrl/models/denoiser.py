"""ModelDenoiser: a Denoiser around a module of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .families import FamilyConfig, MaskPredictor
from .families.cache import Cache


@dataclass(frozen=True, eq=False)
class ModelDenoiser:
    """A Denoiser around a family's module (see ``families/``).

    ``end_ids``: ``eos_id`` and the tokenizer's end-of-turn ids; empty means ``eos_id`` alone.
    ``pieces``: how the tokenizer reads ids, for display.
    """

    model: MaskPredictor
    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int
    end_ids: tuple[int, ...] = ()
    pieces: Callable[[Sequence[int]], list[str]] | None = None

    @classmethod
    def from_model(cls, model: MaskPredictor) -> ModelDenoiser:
        """Take the ids from ``model.config``."""
        config: FamilyConfig = model.config
        return cls(
            model=model,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            pad_id=config.pad_token_id,
            vocab_size=config.embedding_size,
        )

    @classmethod
    def of(cls, denoiser: ModelDenoiser, **more: Any) -> ModelDenoiser:
        """The same module and ids in this class, which may surround its passes (``passing``)."""
        return cls(**{f.name: getattr(denoiser, f.name) for f in fields(ModelDenoiser)}, **more)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Positions of the model: prompt and completion together."""
        return self.model.config.max_sequence_length

    @property
    def block_length(self) -> int | None:
        """Tokens of a block of a block-causal model; None: its attention is full."""
        return self.model.block_length

    @property
    def one_pass(self) -> bool:
        """Whether a batch must be one call of the body: ranks that hold shards make it together."""
        return self.model.cpu_chunk is None

    def passing(self) -> AbstractContextManager[None]:
        """What surrounds every pass of the body, of either kind."""
        return nullcontext()

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm."""
        with self.passing():
            return self.model.hidden(ids, attention_mask)

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Cache | None = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """A block-causal model's hidden states under a visibility of the caller's."""
        with self.passing():
            return self.model.hidden_under(ids, positions, visible, cache, columns)

    def new_cache(self, rows: int, columns: int) -> Cache:
        """A block-causal model's empty cache."""
        return self.model.new_cache(rows, columns)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits at chosen rows of ``hidden``."""
        return self.model.head(hidden)

    def logits(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """head(hidden(ids))."""
        return self.head(self.hidden(ids, attention_mask))
