"""How the figures of several ranks, or of a step's inner updates, become one by the table of
metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .metrics import Metric, find

# What a loss from outside returns: like our own, local sums over the step's global counts.
_FOREIGN = Metric("*", "-", "", "sum", updates="mean")


def over_ranks(key: str, values: Sequence[float]) -> float:
    """One figure from those of all ranks, NaN where any that counts is NaN; a sum for unknown
    keys.
    """
    rule = (find(key) or _FOREIGN).ranks
    if rule == "max":
        return math.nan if any(map(math.isnan, values)) else max(values)
    if rule == "same":
        return values[0]
    total = sum(values)
    return total / len(values) if rule == "mean" else total


def over_updates(key: str, values: Sequence[float]) -> float:
    """One figure of a step from those of its inner updates."""
    rule = (find(key) or _FOREIGN).updates or "mean"
    if rule == "max":
        return max(values)
    return sum(values) if rule == "sum" else sum(values) / len(values)
