"""Results of evaluations as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ..evaluation.evaluate import EvalResult
from ..evaluation.sweep import Way


def ways_table(title: str, ways: Sequence[Way], entries: Sequence[dict[str, Any]]) -> Table:
    """A row per way of decoding."""
    several = "accuracy_sd" in entries[0]
    table = Table(
        "decode",
        "accuracy",
        "95%",
        *(["sd, seeds"] if several else []),
        "calls",
        "tokens/call",
        "seconds",
        title=title,
    )
    for way, e in zip(ways, entries, strict=True):
        table.add_row(
            way.label,
            f"{100 * e['accuracy']:.1f}%",
            f"{100 * e['accuracy_low']:.1f} to {100 * e['accuracy_high']:.1f}",
            *([f"{100 * e['accuracy_sd']:.1f}"] if several else []),
            f"{e['nfe']:.1f}",
            f"{e['tokens_per_call']:.2f}",
            f"{e['seconds']:.1f}",
        )
    return table


def eval_table(title: str, result: EvalResult) -> Table:
    """The summary of an evaluation, one figure per row."""
    summary = result.summary()
    table = Table("figure", "value", title=title)
    low, high = result.interval
    table.add_row(
        "accuracy", f"{100 * result.accuracy:.1f}% (95%: {100 * low:.1f} to {100 * high:.1f})"
    )
    for key, value in summary.items():
        if key.startswith(("pass@", "accuracy_")) and key not in ("accuracy_low", "accuracy_high"):
            table.add_row(key.replace("accuracy_", "accuracy, "), f"{100 * value:.1f}%")
    table.add_row("problems x samples", f"{summary['num_problems']} x {result.samples}")
    table.add_row("denoiser calls per completion", f"{summary['nfe']:.1f}")
    table.add_row("tokens per call", f"{summary['tokens_per_call']:.2f}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("decode", ", ".join(f"{k}={v}" for k, v in result.decode.items()))
    return table
