"""What the checkers share: how they fail, and when two numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# eps; two layers of a small network lose some 20 forward and 100 backward
ROUNDING = 256


def require(holds: bool, said: str) -> None:
    """AssertionError with a sentence unless it holds, also under ``python -O``."""
    if not holds:
        raise AssertionError(said)


def close(got: Tensor, want: Tensor, units: float = ROUNDING) -> bool:
    """Whether |got - want| <= units * eps * largest |want| and shapes are equal; eps is the coarser
    dtype's, and never more than a tenth of |want| is rounding.
    """
    if got.shape != want.shape:
        return False
    if not want.numel():
        return True
    eps = max(torch.finfo(got.dtype).eps, torch.finfo(want.dtype).eps)
    want = want.detach().double()
    error = (got.detach().double() - want).abs().max()
    return bool(error <= min(units * eps, 0.1) * want.abs().max().clamp(min=1e-300))


@contextmanager
def nothing_drawn(what: str) -> Iterator[None]:
    """AssertionError if torch's global generator is used or seeded inside the ``with`` block."""
    before = torch.get_rng_state()
    yield
    require(
        torch.equal(before, torch.get_rng_state()),
        f"{what} used or seeded torch's global generator: draw from an explicit one",
    )
