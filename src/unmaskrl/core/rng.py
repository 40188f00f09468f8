"""Scoped randomness: named generators, and one uniform per (seed, row, call, position).

Nothing here reads or writes a global generator. Named generators make a run resumable at any step
without storing generator states; counter-based uniforms make a row's draws independent of batch,
order, padding and rank.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import finest_dtype

# splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit constants: int64 products wrap as unsigned
# ones do.
_GOLDEN = -0x61C8864680B583EB
_MUL1 = -0x40A7B892E31B1A47
_MUL2 = -0x6B2FB644ECCEEE15


def named_seed(seed: int, *name: str | int) -> int:
    """A 62-bit seed that is a hash of the run's seed and a purpose, e.g.
    ``named_seed(0, "views", step, 2)``.
    """
    text = "/".join([str(seed), *map(str, name)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 2


def named_generator(seed: int, *name: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose of a run."""
    return torch.Generator().manual_seed(named_seed(seed, *name))


def draw_seed(generator: torch.Generator) -> int:
    """One 62-bit seed out of a generator (advances it)."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def counter_uniform(seed: int, *counters: Int[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Uniforms in (0, 1), one per element, that depend on the seed and the counters at that element
    alone.

    u = (top b bits of mix(... mix(mix(seed) + c_1) ... + c_n) + 1/2) / 2**b, with mix =
    splitmix64's finaliser and b = 52 (23 on a device without float64).
    """
    shape = torch.broadcast_shapes(*(c.shape for c in counters))
    state = torch.full((), seed, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        state = _mix(state + _GOLDEN) + counter.to(torch.int64)
    dtype = finest_dtype(state.device)
    used = 52 if dtype == torch.float64 else 23
    bits = _shift_right(_mix(state + _GOLDEN), 64 - used).expand(shape)
    return (bits.to(dtype) + 0.5) * 2.0**-used


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MUL1
    x = (x ^ _shift_right(x, 27)) * _MUL2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed integer
