"""Variances of likelihood estimates per estimator and version, as a table and as a picture."""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..core.variance import MEASURES, ROUNDING, VERSIONS, Interval
from .charts import COLOURS, short_number, style_axes


def variance_table(result: dict[str, Any]) -> Table:
    """Three rows per estimator; below each figure its ratio to "full" and the 95% interval."""
    title = (
        f"{result['model']} on {result['task']}: {result['num_rows']} rows, {result['draws']} "
        "draws each"
    )
    heads = ("", "canvases", "mean", "variance", "/ f^2", "/ c^2", "rows\nthat rose")
    table = Table(
        *heads, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left"
    )
    table.caption = (
        "full: every token scored, no exit. free: anchors given. free+exit: as it was run. "
        "Variance in nats^2, and divided by f^2 (f: tokens that the version scores) and c^2 (c: "
        "tokens of the completion); below: ratio to full, 95% interval. Rows that rose: variance "
        "higher than in full (in brackets: clearly)."
    )
    for estimator in result["estimators"]:
        table.add_row(estimator["name"].replace(":", ":\n "), style="bold")
        for version, figures in estimator["versions"].items():
            ratios = figures.get("ratio", dict.fromkeys(MEASURES))
            table.add_row(
                f" {version}",
                f"{figures['canvases']:.2f}",
                f"{figures['mean']:.2f}",
                *(
                    f"{short_number(figures[m], 3)}\n{interval_text(ratios[m])}".rstrip()
                    for m in MEASURES
                ),
                f"{100 * figures['rose']:.0f}%\n({100 * figures['rose_clearly']:.0f}%)"
                if "rose" in figures
                else "",
            )
    return table


def verdicts(result: dict[str, Any]) -> list[str]:
    """A sentence per estimator: whether pruning lowered the variance of a completion's likelihood,
    by the 95% interval of its ratio to the unpruned one.
    """
    return [
        f"{estimator['name']}: {_verdict(estimator['versions'])}"
        for estimator in result["estimators"]
    ]


def _verdict(versions: dict[str, Any]) -> str:
    known = {
        name: versions[name].get("ratio", {}).get("variance") for name in ("free", "free+exit")
    }
    pruned = known["free+exit"]
    if pruned is None:
        return "no verdict, there is no variance without pruning to compare with."
    _, low, high = pruned
    helped = "pruning helped" if high < 1 else "pruning hurt" if low > 1 else "no clear difference"
    parts = [
        f"{_times(ratio)} with {what}"
        for ratio, what in ((known["free"], "anchors"), (pruned, "the exit too"))
        if ratio is not None
    ]
    return f"{helped}: variance {', '.join(parts)} (95% intervals)."


def _times(ratio: Interval) -> str:
    """``2.7 times lower (1.9 to 4.3)``."""
    share, low, high = ratio
    if share <= 1:
        ends = [f"{1 / x:.1f}" if x > 0 else "inf" for x in (share, high, low)]
    else:
        ends = [f"{x:.1f}" for x in (share, low, high)]
    word = "lower" if share <= 1 else "higher"
    return f"{ends[0]} times {word} ({ends[1]} to {ends[2]})"


def interval_text(interval: Interval | None) -> str:
    """``0.62 (0.55-0.70)``; nothing where there is no variance to compare with."""
    return "" if interval is None else f"{interval[0]:.2f} ({interval[1]:.2f}-{interval[2]:.2f})"


def variance_png(result: dict[str, Any], path: Path) -> None:
    """Figure 3 of the STP paper as a fair test: a row's variance in the three versions, as a total
    and per free token.
    """
    from matplotlib.figure import Figure

    shown = result["estimators"]
    width = max(8.0, 1.6 + 1.5 * len(shown))
    columns = int(14.5 * width)
    paragraphs = [*verdicts(result), "", caption(result)]
    text = "\n".join(textwrap.fill(paragraph, width=columns) for paragraph in paragraphs)
    # inches: the names of the estimators and the words below
    foot = 0.8 + 0.165 * (text.count("\n") + 1)
    height = 7.0 + foot
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    edge = 0.6 / width
    figure.subplots_adjust(
        left=edge, right=1 - 0.15 / width, top=1 - 0.95 / height, bottom=foot / height, hspace=0.16
    )
    title = (
        f"Variance of likelihood estimates over {result['draws']} draws of masks, "
        f"{result['num_rows']} completions"
    )
    figure.text(edge, 1 - 0.35 / height, title, fontsize=12, fontweight="bold")
    above, below = figure.subplots(2, 1, sharex=True)
    _panel(above, shown, "of a row's total (nats^2)", lambda variance, free: variance)
    _panel(
        below,
        shown,
        "per action token of the version: / f^2",
        lambda variance, free: variance / free**2,
    )
    above.tick_params(labelbottom=False)
    figure.legend(
        *above.get_legend_handles_labels(),
        loc="upper right",
        ncol=3,
        frameon=False,
        fontsize=9.5,
        bbox_to_anchor=(1, 1 - 0.4 / height),
    )
    figure.text(
        edge,
        (foot - 0.55) / height,
        text,
        fontsize=8.2,
        va="top",
        color="#5b6672",
        parse_math=False,
        linespacing=1.4,
    )
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axes: Any, shown: Sequence[dict[str, Any]], title: str, measure: Any) -> None:
    """Boxes (quartiles, whiskers at 5% and 95%), a dot per row, a bar at the mean, on a log
    axis.
    """
    jitter = random.Random(0)
    for i, estimator in enumerate(shown):
        for k, version in enumerate(VERSIONS):
            figures = estimator["versions"][version]
            pairs = zip(figures["rows"], figures["free"], strict=True)
            values = [measure(variance, free) for variance, free in pairs if variance > ROUNDING]
            if not values:
                continue
            x = i + 0.26 * (k - 1)
            colour = COLOURS[(5, 0, 1)[k]]
            mean = measure_mean(figures, measure)
            ink = {"color": colour, "linewidth": 1.2}
            axes.boxplot(
                values,
                positions=[x],
                widths=0.2,
                whis=(5, 95),
                showfliers=False,
                boxprops=ink,
                whiskerprops=ink,
                capprops=ink,
                medianprops=ink,
            )
            spread = [x + jitter.uniform(-0.07, 0.07) for _ in values]
            axes.scatter(spread, values, s=9, color=colour, alpha=0.35, linewidths=0)
            label = {"label": version} if not i else {}
            axes.plot(
                [x - 0.11, x + 0.11],
                [mean, mean],
                color=colour,
                linewidth=3,
                solid_capstyle="butt",
                **label,
            )
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.minorticks_off()
    style_axes(axes, lambda value: short_number(value, 3))
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_xticks(range(len(shown)), [e["name"].replace(":", "\n") for e in shown], fontsize=8)


def measure_mean(figures: dict[str, Any], measure: Any) -> float:
    """The mean over rows of a measure of variance and free tokens."""
    values = [measure(v, f) for v, f in zip(figures["rows"], figures["free"], strict=True)]
    return math.fsum(values) / len(values)


def caption(result: dict[str, Any]) -> str:
    """What is compared and what the figures may not be taken for."""
    r = result
    s = result["rollouts"]
    return (
        f"The same {r['num_rows']} completions of {r['model']} in all versions "
        f"({r['num_problems']} problems; on average "
        f"{s['tokens']:.1f} tokens up to EOS, {s['anchors']:.1f} of them anchors, "
        f"{s['exit_tokens']:.1f} filled by the exit "
        "call). full: every token an action, no exit; free: anchors given; free+exit: as it was "
        "run. Variance over masks of a "
        "row's estimate, unbiased, nats^2; thick bar and table: mean over rows; ratios: of means "
        "over rows, bootstrap over "
        "problems. The versions have different targets: full also explains the anchors, free+exit "
        "is the bound of the pruned "
        "process. The same draws per estimate in all three; the exit's view is one canvas more "
        "where there is one. f: action "
        "tokens of the version (c in full); c: completion tokens, the same in all versions (ratios "
        "about those of the total). "
        f"A single row's variance is known to about {100 * math.sqrt(2 / (r['draws'] - 1)):.0f}% "
        "(relative s.d. if normal)."
    )
