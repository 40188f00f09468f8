"""Rows of logs in words: accuracies with intervals, verdicts, durations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def preferred(after: dict[str, Row]) -> Row:
    """The row of the weights that become the model: EMA if there are any, else raw; {} if there is
    none.
    """
    return after.get("ema") or after.get("raw") or next(iter(after.values()), {})


def verdict(before: Row, after: Row) -> str:
    """Whether the 95% intervals of two eval rows overlap, in one line."""
    old = estimate(before)
    new = estimate(after)
    if old is None or new is None:
        return "No comparison: the accuracy before or after has no interval."
    (a, a_low, a_high) = old
    (b, b_low, b_high) = new
    change = f"{100 * (b - a):+.1f} points"
    if b_low > a_high or b_high < a_low:
        return (
            f"The 95% intervals do not overlap ({change}). They cover the draw of problems, not "
            "of the training seed."
        )
    return f"The 95% intervals overlap: the change of {change} may be chance."


def estimate(row: Row) -> tuple[float, float, float] | None:
    """Accuracy and its 95% interval (low, high) of an eval row; None if one of them is missing."""
    share, low, high = (number(row, key) for key in ("accuracy", "accuracy_low", "accuracy_high"))
    return None if share is None or low is None or high is None else (share, low, high)


def eval_line(row: Row) -> str:
    """One line about an eval row."""
    where = " ".join(str(row[key]) for key in ("split", "weights") if row.get(key) is not None)
    step = f" step {row['step']}" if row.get("step") is not None else ""
    parts = [
        f"eval {where}{step}".replace("  ", " ") + f": accuracy {percent(number(row, 'accuracy'))}"
    ]
    if interval(row) != "-":
        parts.append(f"95% interval {interval(row)}")
    parts += [f"{row['num_problems']} problems"] if row.get("num_problems") is not None else []
    parts += [f"{nfe:.1f} calls each"] if (nfe := number(row, "nfe")) is not None else []
    return ", ".join(parts)


def interval(row: Row) -> str:
    """``37.0-45.5%`` or ``-``."""
    low = number(row, "accuracy_low")
    high = number(row, "accuracy_high")
    return "-" if low is None or high is None else f"{100 * low:.1f}-{100 * high:.1f}%"


def number(row: Row, key: str) -> float | None:
    """The row's finite number under ``key``, else None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(share: float | None) -> str:
    """``41.2%`` or ``-``."""
    return "-" if share is None else f"{100 * share:.1f}%"


def decimal(value: float | None, digits: int) -> str:
    """A fixed number of digits, or ``-``."""
    return "-" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
