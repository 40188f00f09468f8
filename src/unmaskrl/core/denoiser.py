"""Denoiser: what the core asks of a model. ids (B, L) -> hidden (B, L, D) -> logits at chosen rows.

Row l predicts position l, for every family. A denoiser draws nothing, and its batch rows are
independent. ``docs/models.md`` shows how a model of another library becomes one.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    """A mask predictor with its special ids; ``vocab_size`` is the width of the logits."""

    @property
    def mask_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Row l is about position l; keys where ``attention_mask`` is False (left pads) are not
        attended.
        """
        ...

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits at chosen rows of ``hidden``."""
        ...

    def logits(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """head(hidden(ids)): for short canvases; large vocabularies should pick rows first."""
        ...


def end_ids(denoiser: Denoiser) -> tuple[int, ...]:
    """Ids that end a completion: ``eos_id``, and what a denoiser that ends chat turns otherwise
    names in ``end_ids``.
    """
    return getattr(denoiser, "end_ids", ()) or (denoiser.eos_id,)
