"""Accuracy against denoiser calls, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.frontier import KINDS
from .charts import COLOURS, style_axes


def frontier_table(result: dict[str, Any]) -> Table:
    """Points in order of calls; the verdict below."""
    table = Table(
        "decoding", "", "calls", "accuracy", "95%", title=result["model"], caption_justify="left"
    )
    for p in sorted(result["points"], key=lambda p: (KINDS.index(p["kind"]), p["nfe"])):
        interval = f"{100 * p['low']:.1f} to {100 * p['high']:.1f}"
        table.add_row(
            p["kind"], p["label"], f"{p['nfe']:.1f}", f"{100 * p['accuracy']:.1f}%", interval
        )
    if "gain_over_fixed" in result:
        table.caption = (
            "learned against the best fixed gammas at equal calls: "
            f"{100 * result['gain_over_fixed']:+.1f} points; "
            f"against its gammas on the wrong prompts: {100 * result['gain_over_shuffled']:+.1f}"
        )
    return table


def frontier_png(result: dict[str, Any], path: Path) -> None:
    """Accuracy against calls, one panel per model, a colour per kind, labels on the points, 95%
    intervals.
    """
    from matplotlib.figure import Figure

    models = result["models"]
    figure = Figure(figsize=(6.4 * len(models), 4.8), layout="constrained")
    for n, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), n + 1)
        style_axes(axes, lambda value: f"{value:g}")
        for colour, kind in zip(COLOURS, KINDS, strict=False):
            points = sorted(
                (p for p in model["points"] if p["kind"] == kind), key=lambda p: p["nfe"]
            )
            if not points:
                continue
            x = [p["nfe"] for p in points]
            y = [100 * p["accuracy"] for p in points]
            bars = [
                [100 * (p["accuracy"] - p["low"]) for p in points],
                [100 * (p["high"] - p["accuracy"]) for p in points],
            ]
            alone = kind in ("learned", "shuffled")
            axes.errorbar(
                x,
                y,
                yerr=bars,
                color=colour,
                lw=0 if alone else 1.4,
                elinewidth=0.8,
                alpha=0.9,
                capsize=2,
            )
            axes.plot(
                x,
                y,
                "*" if alone else "o",
                color=colour,
                ms=13 if alone else 4,
                label=kind,
                zorder=3,
            )
            for p in [] if alone else points:
                axes.annotate(
                    p["label"],
                    (p["nfe"], 100 * p["accuracy"]),
                    (4, 4),
                    textcoords="offset points",
                    size=7,
                    color=colour,
                )
        axes.set(xlabel="denoiser calls per completion", ylabel="accuracy, %", title=model["model"])
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
