"""A run folder -> one self-contained HTML file (shell): headline numbers, curves, decodings, the
resolved config.

No network, no script; the same run gives the same file. What a run cut short lacks is left out, and
whatever its logs hold is escaped.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import write_text
from ..utils.plain_text import escape_controls
from .charts import Chart, Line, figure_html, thin
from .metrics import CHARTS, PHASES, is_part, labelled
from .progress import (
    decimal,
    duration,
    estimate,
    interval,
    number,
    percent,
    preferred,
    verdict,
)
from .style import CSS
from .trajectory import is_sample, legend_html, trajectory_html

Row = dict[str, Any]
RUN_FILES = ("config.yaml", "metrics.jsonl", "eval.jsonl", "summary.json")
_NUM_PUZZLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder holds; missing parts are empty."""

    folder: Path
    config_text: str
    config: Row
    metrics: list[Row]
    evals: list[Row]
    samples: list[Row]
    summary: Row

    @property
    def before(self) -> Row:
        """The base's test row, from the summary or the log; {} if there is none."""
        rows = [
            row for row in self.evals if row.get("split") == "test" and row.get("weights") == "base"
        ]
        return _mapping(self.summary.get("before")) or (rows[0] if rows else {})

    @property
    def after(self) -> dict[str, Row]:
        """The last test row of the raw and the averaged weights."""
        stored = {
            key: row for key, row in _mapping(self.summary.get("after")).items() if _mapping(row)
        }
        logged = {str(row.get("weights")): row for row in self.evals if row.get("split") == "test"}
        return stored or {key: logged[key] for key in ("raw", "ema") if key in logged}

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return str(
            self.summary.get("name") or self.config.get("name") or self.folder.resolve().name
        )


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` and return its path. Raises ValueError if ``run`` is no run
    folder.
    """
    data = load_run(run)
    body = "".join(part(data) for part in (_headline, _curves, _decodings, _config))
    title = html.escape(data.name)
    page = escape_controls(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )
    path = data.folder / "report.html"
    write_text(path, page)
    return path


def load_run(run: Path) -> Run:
    """Read a run folder, as far as it goes. Raises ValueError if it holds none of a run's files."""
    folder = Path(run)
    if not any((folder / name).is_file() for name in RUN_FILES):
        names = ", ".join(RUN_FILES)
        raise ValueError(
            f"{run} is no run folder (none of {names} is there): pass what `unmaskrl train` wrote"
        )
    text = _read_text(folder / "config.yaml")
    try:
        config = _mapping(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError):
        config = {}  # shown as text all the same
    summary = _read_rows(_read_text(folder / "summary.json").replace("\n", " "))
    return Run(
        folder=folder,
        config_text=text,
        config=config,
        metrics=_read_rows(_read_text(folder / "metrics.jsonl")),
        evals=_read_rows(_read_text(folder / "eval.jsonl")),
        samples=[row for row in _read_rows(_read_text(folder / "samples.jsonl")) if is_sample(row)],
        summary=summary[0] if summary else {},
    )


def charts(run: Run) -> dict[str, list[Chart]]:
    """The figures by section, without the empty ones."""
    lines = {key: _metric_lines(run.metrics, key) for key in CHARTS}
    lines["seconds"] = _phase_lines(run.metrics)
    if all(row.get("accuracy/anchored") is None for row in run.metrics):
        # nothing is anchored: all are blank
        lines["accuracy"] = [line for line in lines["accuracy"] if line.label != "blank"]
    result: dict[str, list[Chart]] = {"Learning": [_held_out("step", run.evals, _step)]}
    for key, plan in CHARTS.items():
        chart = Chart(
            title=plan.title,
            lines=lines[key],
            floor=plan.floor,
            is_share=plan.is_share,
            stacked=plan.stacked,
        )
        result.setdefault(plan.section, []).append(chart)
    result["Cost"].append(_held_out("denoiser calls", run.evals, _cost(run.metrics)))
    filled = {
        s: [_without_empty(c) for c in group if any(x.points for x in c.lines)]
        for s, group in result.items()
    }
    return {section: group for section, group in filled.items() if group}


def _held_out(x: str, evals: Sequence[Row], x_of: Callable[[Row], float | None]) -> Chart:
    title = "Held-out accuracy, 95% intervals" if x == "step" else "Held-out accuracy by cost"
    lines = _eval_lines(evals, x_of)
    return Chart(title=title, lines=lines, x=x, floor=0.0, is_share=True)


def _step(row: Row) -> float | None:
    return number(row, "step")


def _cost(metrics: Sequence[Row]) -> Callable[[Row], float | None]:
    """Row -> denoiser calls spent up to its step."""
    spent = {
        row.get("step"): calls
        for row in metrics
        if (calls := number(row, "calls/total")) is not None
    }
    return lambda row: 0.0 if spent and row.get("step") == 0 else spent.get(row.get("step"))


def _metric_lines(metrics: Sequence[Row], chart: str) -> list[Line]:
    """A line per key of the chart; the parts of the reward follow their sum."""
    labels = labelled(chart)
    if chart == "reward":
        parts = sorted({key for row in metrics for key in row if is_part(key)})
        labels |= {key: key.removeprefix("reward/") for key in parts}
    return [_metric_line(metrics, key, label) for key, label in labels.items()]


def _metric_line(metrics: Sequence[Row], key: str, label: str) -> Line:
    pairs = ((_step(row), number(row, key)) for row in metrics)
    return Line(label=label, points=[(x, y) for x, y in pairs if x is not None and y is not None])


def _eval_lines(evals: Sequence[Row], x_of: Callable[[Row], float | None]) -> list[Line]:
    """A line per split and weights; the base's row starts every line of its split."""
    kinds = dict.fromkeys((str(r.get("split")), str(r.get("weights"))) for r in evals)
    later = {split for split, weights in kinds if weights != "base"}
    lines = []
    for split, weights in sorted(kinds, key=lambda kind: (kind[0] == "test", kind)):
        if weights == "base" and split in later:
            continue
        rows = [
            r for r in evals if r.get("split") == split and r.get("weights") in ("base", weights)
        ]
        points = []
        bars = []
        for r in rows:
            x = x_of(r)
            y = number(r, "accuracy")
            if x is not None and y is not None:
                points.append((x, y))
                bars.append((x, *(estimate(r) or (y, y, y))[1:]))
        lines.append(
            Line(label=f"{split}, {weights}", points=points, bars=bars, dashed=split == "test")
        )
    return lines


def _phase_lines(metrics: Sequence[Row]) -> list[Line]:
    """Seconds of each phase, means over at most 80 stretches; a step without a phase spent 0 s in
    it.
    """
    rows = [row for row in metrics if _step(row) is not None]
    lines = []
    for key, name in PHASES.items():
        values = [number(row, key) for row in rows]
        if any(values):
            points = [
                (_step(row) or 0.0, value or 0.0) for row, value in zip(rows, values, strict=True)
            ]
            lines.append(Line(label=name, points=thin(points, 80)))
    return lines


def _headline(run: Run) -> str:
    """Name, settings, and accuracy before and after."""
    settings = html.escape(_settings(run.config))
    rows = {"before": run.before, **{f"after, {key}": row for key, row in run.after.items()}}
    body = "".join(_headline_row(name, row) for name, row in rows.items() if row)
    names = ("NFE", "tok/call", "problems")
    head = '<th>weights</th><th>accuracy</th><th>95% interval</th><th class="wide">0 to 100%</th>'
    head += "".join(f"<th>{name}</th>" for name in names)
    table = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>' if body else ""
    judged = (
        html.escape(verdict(run.before, preferred(run.after)))
        if run.before and run.after
        else _unfinished(run)
    )
    return (
        f"<h1>{html.escape(run.name)}</h1><p "
        f'class="muted">{settings}</p>{table}<p>{judged}</p>{_effort(run)}'
    )


def _unfinished(run: Run) -> str:
    steps = [int(x) for row in run.metrics if (x := _step(row)) is not None]
    return (
        "This run has no final evaluation; "
        f"{f'its log ends at step {max(steps)}' if steps else 'no step was logged'}."
    )


def _headline_row(name: str, row: Row) -> str:
    strip = ""
    if known := estimate(row):
        share, low, high = known
        bar = (
            f'<i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i><b '
            f'style="left:{100 * share:.1f}%"></b>'
        )
        strip = f'<div class="strip" aria-hidden="true">{bar}</div>'
    calls = decimal(number(row, "nfe"), 1)
    tokens = decimal(number(row, "tokens_per_call"), 2)
    problems = html.escape(str(row.get("num_problems", "-")))
    return (
        f"<tr><td>{html.escape(name)}</td><td "
        f'class="big">{percent(number(row, "accuracy"))}</td><td>{interval(row)}</td>'
        f'<td class="wide">{strip}</td>'
        f"<td>{calls}</td><td>{tokens}</td><td>{problems}</td></tr>"
    )


def _effort(run: Run) -> str:
    """Wall time, steps, updates, machine: one muted line."""
    last = run.metrics[-1] if run.metrics else {}
    minutes = number(run.summary, "minutes")
    seconds = number(last, "seconds")
    seconds = 60 * minutes if minutes is not None else seconds
    facts = [f"wall time {duration(seconds)}"] if seconds is not None else []
    for key, name in (("steps", "steps"), ("updates", "updates"), ("threads", "threads")):
        value = run.summary.get(key, last.get(key.removesuffix("s") if key == "steps" else key))
        facts += [f"{value} {name}"] if value is not None else []
    calls = number(last, "calls/total")
    facts += [f"{calls:,.0f} denoiser calls (rows)"] if calls is not None else []
    facts += [
        f"{key} {run.summary[key]}"
        for key in ("device", "seed")
        if run.summary.get(key) is not None
    ]
    return f'<p class="muted">{html.escape(" | ".join(facts))}</p>'


def _settings(config: Row) -> str:
    """The settings that matter, in one line."""
    shown = {
        "task": None,
        "estimator": None,
        "advantage": None,
        "loss": None,
        "prior": ("name", "select", "keep", "keep_end", "share"),
        "decode": ("gen_length", "block_length", "steps", "select", "temperature", "exit_at"),
        "train": ("prompts_per_step", "group_size", "num_iterations", "ema"),
        "optimizer": ("name", "lr"),
        "run": ("seed",),
    }
    parts = []
    for section, keys in shown.items():
        values = _mapping(config.get(section))
        if section == "prior" and values.get("name") == "none":
            keys = ("name",)
        picked = {k: values[k] for k in keys or values if values.get(k) is not None}
        words = [str(v) if k == "name" else f"{k}={v}" for k, v in picked.items()]
        parts += [f"{section} {' '.join(words)}"] if words else []
    return "; ".join(parts)


def _curves(run: Run) -> str:
    return "".join(
        f'<h2>{section}</h2><div class="charts">{"".join(map(figure_html, group))}</div>'
        for section, group in charts(run).items()
    )


def _decodings(run: Run) -> str:
    """Test puzzles at the first and the last step, and the last rollouts with and without
    anchors.
    """
    pairs = _test_pairs(run.samples)
    train = [row for row in run.samples if row.get("split") == "train"]
    for anchored in (True, False):
        pairs += [[row] for row in train if bool(row.get("anchored")) == anchored][-1:]
    if not pairs:
        return ""
    return f"<h2>Decoding order</h2>{legend_html()}{''.join(map(_puzzle, pairs))}"


def _test_pairs(samples: Sequence[Row]) -> list[list[Row]]:
    """First and last sample of the puzzles that were seen longest, at most three."""
    by_id: dict[str, list[Row]] = {}
    for row in samples:
        if str(row.get("split")).startswith("test"):  # test-base, test-raw, test-ema
            by_id.setdefault(str(row.get("id")), []).append(row)
    best = sorted(by_id.values(), key=lambda rows: -len(rows))[:_NUM_PUZZLES]
    return [[rows[0], rows[-1]] if len(rows) > 1 else rows for rows in best]


def _puzzle(rows: Sequence[Row]) -> str:
    prompt = html.escape(str(rows[0].get("prompt", "")).strip())
    grids = "".join(trajectory_html(row, legend=False) for row in rows)
    return (
        f'<div class="puzzle"><div class="prompt">{prompt}</div><div '
        f'class="pair">{grids}</div></div>'
    )


def _config(run: Run) -> str:
    if not run.config_text:
        return ""
    text = html.escape(run.config_text)
    return (
        f"<h2>Settings</h2><details><summary>Resolved config</summary><pre>{text}</pre></details>"
    )


def _without_empty(chart: Chart) -> Chart:
    return replace(chart, lines=[line for line in chart.lines if line.points])


def _mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_rows(text: str) -> list[Row]:
    """The JSON objects among the lines; a line cut by a kill is left out."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [row for row in rows if isinstance(row, dict)]
