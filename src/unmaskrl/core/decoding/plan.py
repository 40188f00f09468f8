"""What a denoiser call will do, on the device (``Plan``) and as far as the host must know
(``Sizes``)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Positions that each row may reveal and their number, how many it reveals, and whether the
    call is its exit.
    """

    window: Bool[Tensor, "*shape"]
    width: Int[Tensor, " B"]
    count: Int[Tensor, " B"]
    exits: Bool[Tensor, " B"]

    def of(self, rows: Int[Tensor, " A"]) -> Plan:
        """The plan of these rows alone."""
        return Plan(self.window[rows], self.width[rows], self.count[rows], self.exits[rows])


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers over all active rows, from which every shape of a call follows."""

    rows: int
    open: int  # positions in the windows
    widest: int  # of the widest window
    reveal: int  # tokens; with an adaptive rule the most it may reveal
    behind: int  # blocks that a row finished in the call before, at most (block-causal only)
    end: int  # column behind the last active block (block-causal only)


def places(mask: Bool[Tensor, "*shape"], size: int) -> tuple[Int[Tensor, " size"], ...]:
    """``mask.nonzero(as_tuple=True)`` of a mask with ``size`` True elements, without a
    synchronisation.
    """
    if mask.device.type == "mps":  # the oldest torch we allow has no static form there
        return mask.nonzero(as_tuple=True)
    return mask.nonzero_static(size=size).unbind(-1)
