"""Accuracy against denoiser calls, as a table and as a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.frontier import KINDS
from .charts import COLOURS, DASHES, style_axes

_STARS = {"learned": "*", "shuffled": "*"}
# where a label may stand: right below the point, left above it, right, left, ...
_AROUND = ((1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1), (1, 1), (-1, -1))


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
    """``frontier_figure`` as a file."""
    frontier_figure(result).savefig(path, dpi=150)


def frontier_figure(result: dict[str, Any]) -> Any:
    """Accuracy against calls (log scale), one panel per model: a colour and a dash per kind, 95%
    intervals, and a label at every point that has room for one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = result["models"]
    figure = Figure(figsize=(6.4 * len(models), 5), layout="constrained")
    FigureCanvasAgg(figure)  # measures texts
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _draw(axes, model)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed where the axes now stand
    for axes, model in zip(panels, models, strict=True):
        _label(axes, model["points"])
    return figure


def _draw(axes: Any, model: dict[str, Any]) -> None:
    """Points, lines and intervals; learned and shuffled are single points, drawn as stars."""
    calls = [p["nfe"] for p in model["points"]]
    for i, kind in enumerate(KINDS):
        points = sorted((p for p in model["points"] if p["kind"] == kind), key=lambda p: p["nfe"])
        if not points:
            continue
        x = [p["nfe"] for p in points]
        y = [100 * p["accuracy"] for p in points]
        low = [100 * (p["accuracy"] - p["low"]) for p in points]
        high = [100 * (p["high"] - p["accuracy"]) for p in points]
        star = kind in _STARS
        axes.errorbar(
            x,
            y,
            yerr=[low, high],
            color=COLOURS[i],
            linestyle="none" if star else DASHES[i],
            linewidth=1.5,
            elinewidth=0.7,
            marker=_STARS.get(kind, "o"),
            markersize=14 if star else 4.5,
            markerfacecolor="none" if kind == "shuffled" else COLOURS[i],
            markeredgewidth=1.4 if star else 0,
            label=kind,
            zorder=4 if star else 3,
        )
    axes.set_xscale("log")
    style_axes(axes, lambda value: f"{value:g}%")
    near = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
    axes.set_xticks([n for n in near if min(calls) * 0.9 <= n <= max(calls) * 1.1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.margins(0.07)
    axes.set_xlabel("denoiser calls per completion, log scale")
    axes.set_ylabel("accuracy, bars: 95% intervals")
    axes.set_title(model["model"], fontsize=11, fontweight="bold", loc="left")
    axes.legend(fontsize=9, frameon=False, loc="lower right")


def _label(axes: Any, points: list[dict[str, Any]]) -> None:
    """The setting at each point: the first place around it that no other label, no point, no line
    and not the legend takes; none if there is no such place.
    """
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    taken = []
    for kind in KINDS:
        own = sorted((p["nfe"], 100 * p["accuracy"]) for p in points if p["kind"] == kind)
        places = axes.transData.transform(own) if own else []
        taken += [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
        for (x0, y0), (x1, y1) in pairwise(places):
            steps = [i / 40 for i in range(41)]
            between = [(x0 + s * (x1 - x0), y0 + s * (y1 - y0)) for s in steps]
            taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in between]
    taken.append(axes.get_legend().get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    for point in points:
        if point["kind"] in _STARS:
            continue
        for across, up in _AROUND:
            text = axes.annotate(
                point["label"],
                (point["nfe"], 100 * point["accuracy"]),
                (5 * across + 3 * across * (up == 0), 5 * up),
                textcoords="offset points",
                size=8,
                color=COLOURS[KINDS.index(point["kind"])],
                ha={-1: "right", 0: "center", 1: "left"}[across],
                va={-1: "top", 0: "center", 1: "bottom"}[up],
            )
            box = text.get_window_extent(renderer)
            free = box.count_overlaps(taken) == 0
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1:
                taken.append(box)
                break
            text.remove()
