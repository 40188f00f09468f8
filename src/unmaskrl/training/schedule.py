"""The learning rate of an update."""

from __future__ import annotations

import math


def learning_rate(
    update: int, share_done: float, *, lr: float, warmup: int, schedule: str
) -> float:
    """Rate of the 0-based ``update``: linear warm-up, then constant, or linear or cosine decay to 0
    as ``share_done`` -> 1.
    """
    if update < warmup:
        return lr * (update + 1) / warmup
    if schedule == "linear":
        return lr * (1 - share_done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * share_done))
    return lr
