"""What a decoding's settings allow, and how many calls they plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from .select import PROBABILITY, RULES, Rule


def check_decode(
    gen_length: int,
    block_length: int,
    steps: int,
    select: str | Rule,
    temperature: float,
    exit_at: float | None,
    gamma: float | None = None,
    grid: int | None = None,
    *,
    cut: bool = False,
) -> Rule:
    """The rule named ``select``, or a ValueError that says which setting to change.

    ``grid``: the denoiser's own block length, if it is block-causal. ``cut``: the last block may be
    one that is cut, as it may where the denoiser is not known yet.
    """
    if grid is not None and block_length != grid:
        raise ValueError(
            f"block_length {block_length} is not the model's: it is block-causal, with blocks of "
            f"{grid}; set block_length to {grid}"
        )
    if block_length < 1 or (grid is None and not cut and gen_length % block_length):
        raise ValueError(f"block_length {block_length} does not divide gen_length {gen_length}")
    if not 1 <= steps <= gen_length:
        raise ValueError(
            f"steps must be between 1 and gen_length {gen_length} (one token per call), got {steps}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if exit_at is not None and not 0 <= exit_at <= 1:
        raise ValueError(
            "exit_at is the share of open tokens decided before the last call, in [0, 1]; got "
            f"{exit_at}"
        )
    if isinstance(select, str) and select not in RULES:
        raise ValueError(f"select must be one of {', '.join(RULES)}; got {select!r}")
    rule = select if isinstance(select, Rule) else RULES[select]
    unit = rule.unit
    if gamma is not None and not 0 <= gamma <= (1 if unit == PROBABILITY else math.inf):
        raise ValueError(f"gamma of select={named(select)} is {unit}; got {gamma}")
    return rule


def named(select: str | Rule) -> str:
    """A rule as it was asked for, in messages."""
    if isinstance(select, str):
        return repr(select)
    return next(
        (repr(name) for name, rule in RULES.items() if rule is select), "a rule of your own"
    )


def whole_blocks(gen_length: int, block_length: int, shared: int = 0) -> list[int]:
    """Open tokens of each block of a blank completion, of which the first block holds ``shared``
    tokens of the prompt as well; a block that is cut is decoded whole.
    """
    sizes = [block_length] * -(-(shared + gen_length) // block_length)
    sizes[0] -= shared
    return sizes


def planned_calls(
    open_per_block: Sequence[int],
    gen_length: int,
    steps: int,
    exit_at: float | None = None,
    grid: int | None = None,
) -> int:
    """Denoiser calls of a row with these open tokens per block, if no EOS ends it early, and if no
    last block is cut, of which the asked tokens may be decided before the rest.

    Without exit: sum_b ceil(n_b * steps / gen_length). With exit: the calls until keep =
    ceil(exit_at * f) tokens are decided, plus 1 if f > keep. ``grid``: the denoiser's own block
    length, if it is block-causal; then every block exits by itself, as a row of this one block.
    """
    if grid is not None:
        return sum(planned_calls([n], gen_length, steps, exit_at) for n in open_per_block)
    total = sum(open_per_block)
    keep = total if exit_at is None else exit_count(total, exit_at)
    calls = 0
    decided = 0
    for n in open_per_block:
        k = -(-n * steps // gen_length)
        for i in range(k):
            if decided >= keep:
                break
            decided += min(n // k + (i < n % k), keep - decided)
            calls += 1
    return calls + (total > keep)


def exit_count(num_open: int, exit_at: float) -> int:
    """ceil(exit_at * num_open), robust to binary fractions such as 0.7 * 10."""
    return math.ceil(exit_at * num_open - 1e-9)


def exit_counts(most: int, exit_at: float, device: torch.device) -> Int[Tensor, " N"]:
    """``exit_count`` of 0 to ``most`` open tokens."""
    return torch.tensor([exit_count(n, exit_at) for n in range(most + 1)], device=device)
