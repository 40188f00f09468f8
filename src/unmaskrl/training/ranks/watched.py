"""Denoisers that look before every call whether a signal came."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ...models.denoiser import ModelDenoiser
from .shard import Lockstep


@dataclass(frozen=True, eq=False, kw_only=True)
class Watched(ModelDenoiser):
    """A denoiser whose passes are its own."""

    check: Callable[[], None]

    def passing(self) -> AbstractContextManager[None]:
        """May leave by Abandoned, before the ranks of a sharded model are told of a call."""
        self.check()
        return super().passing()


class WatchedLockstep(Watched, Lockstep):
    """A sharded one: a rank that leaves answers the others' calls until all have left."""


def watched(denoiser: ModelDenoiser, check: Callable[[], None]) -> ModelDenoiser:
    """The same weights; ``check`` is called before every pass and may leave by Abandoned."""
    kind = WatchedLockstep if isinstance(denoiser, Lockstep) else Watched
    return kind.of(denoiser, check=check)
