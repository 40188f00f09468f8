"""Several run folders -> one HTML file: what each reached, for how many calls and minutes, and
which settings differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from .charts import COLOURS, Chart, Line
from .curves import eval_line_of, metric_line
from .pages import drawn, render
from .runs import StoredRun, flat, load_run, spent_by
from .words import Row, decimal, duration, estimate, interval, number, percent, preferred

# settings that say where a run lies, not what it is
_PLACES = ("name", "run.out", "run.out")


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page to ``out`` and return it. Raises ValueError if a folder holds no run or is
    given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise ValueError(f"{folder} is given twice; name runs that differ")
    runs = [load_run(folder) for folder in folders]
    names = labels_of(runs)
    results = [_result(i, name, run) for i, (name, run) in enumerate(zip(names, runs, strict=True))]
    page = render(
        "comparison.html",
        title=f"{len(runs)} runs compared",
        results=results,
        verdict=judged(names, runs),
        sections=drawn(comparison_charts(names, runs)),
        settings=differing(runs),
    )
    write_text(out, page)
    return out


def labels_of(runs: Sequence[StoredRun]) -> list[str]:
    """The names of the folders, with as much of their paths as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def comparison_charts(names: Sequence[str], runs: Sequence[StoredRun]) -> dict[str, list[Chart]]:
    """Accuracy on held-out problems and of rollouts, by step, by denoiser calls and by minutes."""
    axes = {
        "step": [None] * len(runs),
        "row calls": [spent_by(run.metrics, "calls/total") for run in runs],
        "minutes": [spent_by(run.metrics, "seconds", 1 / 60) for run in runs],
    }
    sections: dict[str, list[Chart]] = {}
    for x, costs in axes.items():
        both = list(zip(names, runs, costs, strict=True))
        for section, lines in (
            ("Held-out accuracy", [eval_line_of(held_out(r), n, at) for n, r, at in both]),
            (
                "Rollout accuracy",
                [metric_line(r.metrics, "accuracy/rollout", n, at) for n, r, at in both],
            ),
        ):
            chart = _chart(f"{section} by {x}", lines, x)
            if chart is not None:
                sections.setdefault(section, []).append(chart)
    return sections


def held_out(run: StoredRun) -> list[Row]:
    """The rows of the curve: validation while it trained, else the test problems before and
    after.
    """
    rows = [row for row in run.evals if row.get("split") == "validation"]
    if any(row.get("weights") != "base" for row in rows):
        return rows
    last = preferred(run.after).get("weights")
    wanted = ("base", last)
    return [r for r in run.evals if r.get("split") == "test" and r.get("weights") in wanted]


def _chart(title: str, lines: Sequence[Line], x: str) -> Chart | None:
    """Runs keep their colour, so the line of a run without such rows is an empty one."""
    if not any(line.points for line in lines):
        return None
    return Chart(title=title, lines=lines, x=x, floor=0.0, is_share=True)


def _result(index: int, name: str, run: StoredRun) -> dict[str, Any]:
    """A row of the table."""
    after = preferred(run.after)
    last = run.metrics[-1] if run.metrics else {}
    calls = number(last, "calls/total")
    seconds = number(last, "seconds")
    return {
        "colour": index % len(COLOURS),
        "name": name,
        "before": percent(number(run.before, "accuracy")),
        "after": percent(number(after, "accuracy")),
        "interval": interval(after),
        "nfe": decimal(number(after, "nfe"), 1),
        "calls": "-" if calls is None else f"{calls:,.0f}",
        "time": "-" if seconds is None else duration(seconds),
        "steps": last.get("step", "-"),
    }


def judged(names: Sequence[str], runs: Sequence[StoredRun]) -> str:
    """Which run ended highest, and from which others its 95% interval is apart."""
    known = [
        (name, found)
        for name, run in zip(names, runs, strict=True)
        if (found := estimate(preferred(run.after))) is not None
    ]
    if len(known) < 2:
        return "No verdict: fewer than two of the runs have a final evaluation."
    known.sort(key=lambda item: -item[1][0])
    _, (share, low, _) = known[0]
    best = [name for name, found in known if found[0] == share]
    rest = known[len(best) :]
    apart = [name for name, (_, _, high) in rest if high < low]
    near = [name for name, (_, _, high) in rest if high >= low]
    words = [f"{', '.join(best)} ended highest, at {percent(share)}."]
    if apart:
        words.append(f"Its 95% interval does not overlap with that of {', '.join(apart)}.")
    if near:
        words.append(f"The difference to {', '.join(near)} may be chance: the intervals overlap.")
    words.append("Intervals cover the draw of problems, not of the training seed.")
    return " ".join(words)


def differing(runs: Sequence[StoredRun]) -> list[tuple[str, list[str]]]:
    """Settings by section.key that are not the same in all runs, and their values."""
    settings = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = []
    for key in keys:
        values = [one.get(key, "-") for one in settings]
        if key not in _PLACES and any(value != values[0] for value in values):
            rows.append((key, list(map(_setting, values))))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
