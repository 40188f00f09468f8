"""Denoisers that look before every call whether a signal came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...models.denoiser import ModelDenoiser
from ...models.families.cache import Cache
from .shard import Lockstep


@dataclass(frozen=True, eq=False, kw_only=True)
class Watched(ModelDenoiser):
    """A denoiser whose passes are its own."""

    check: Callable[[], None]

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states, or Abandoned."""
        self.check()
        return super().hidden(ids, attention_mask)

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Cache | None = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states, or Abandoned."""
        self.check()
        return super().hidden_under(ids, positions, visible, cache, columns)


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchedLockstep(Lockstep):
    """A sharded one: a rank that leaves answers the others' calls until all have left."""

    check: Callable[[], None]

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Hidden states, or Abandoned before the others are told of a call."""
        self.check()
        return super().hidden(ids, attention_mask)

    def hidden_under(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        visible: Bool[Tensor, "B T S"],
        cache: Cache | None = None,
        columns: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states, or Abandoned."""
        self.check()
        return super().hidden_under(ids, positions, visible, cache, columns)


def watched(denoiser: ModelDenoiser, check: Callable[[], None]) -> ModelDenoiser:
    """The same weights; ``check`` is called before every pass and may leave by Abandoned."""
    kind = WatchedLockstep if isinstance(denoiser, Lockstep) else Watched
    return kind.of(denoiser, check=check)
