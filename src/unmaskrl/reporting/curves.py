"""Which charts a run has: those of the table of metrics, and accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .charts import Chart, Line, thin
from .metrics import PHASES, STEP, is_part, labelled
from .runs import StoredRun, spent_by, step_of
from .words import Row, estimate, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A chart of the report: its section, title, a line of words, and whether it shows shares (0 to
    100%).
    """

    section: str
    title: str
    hint: str = ""
    is_share: bool = False
    floor: float | None = None  # the y axis includes it
    stacked: bool = False


CHARTS = {
    "accuracy": Plan(
        section="Learning",
        title="Rollout accuracy",
        hint="Share of the step's rollouts that are right, with and without anchors.",
        is_share=True,
        floor=0.0,
    ),
    "reward": Plan(section="Learning", title="Reward per rollout", floor=0.0),
    "loss": Plan(section="Learning", title="Loss, nats per masked token", floor=0.0),
    "nfe": Plan(
        section="Cost",
        title="Denoiser calls per rollout",
        hint="Anchors and the exit call save calls; with fewer anchors the calls rise.",
        floor=0.0,
    ),
    "per_call": Plan(section="Cost", title="Tokens per denoiser call", floor=0.0),
    "tokens": Plan(section="Cost", title="Tokens per rollout", floor=0.0),
    "seconds": Plan(
        section="Cost",
        title="Seconds per step",
        hint="Labels: means over the run.",
        floor=0.0,
        stacked=True,
    ),
    "live": Plan(
        section="Health",
        title="Groups with reward spread",
        hint="Only groups whose rewards differ teach.",
        is_share=True,
        floor=0.0,
    ),
    "ratio": Plan(section="Health", title="Probability ratio, mean"),
    "clip": Plan(section="Health", title="Tokens with a clipped ratio", is_share=True, floor=0.0),
    "max_dev": Plan(section="Health", title="Largest |ratio - 1|", floor=0.0),
    "kl": Plan(section="Health", title="KL divergence, nats per token"),
    "likelihood": Plan(section="Health", title="Log-likelihood as sampled, nats per token"),
    "variance": Plan(section="Health", title="Variance of the likelihood, nats^2", floor=0.0),
    "per_free": Plan(
        section="Health",
        title="Variance of the likelihood / f^2",
        hint="f: action tokens of the row.",
        floor=0.0,
    ),
    "gap": Plan(
        section="Health",
        title="Behavior gap, nats",
        hint="Largest difference between a token's log-probability scored and as sampled.",
        floor=0.0,
    ),
    "grad": Plan(section="Health", title="Gradient norm before clipping", floor=0.0),
    "weights": Plan(section="Health", title="Importance weights", floor=0.0),
    "sampler": Plan(section="Health", title="Learned sampler", is_share=True, floor=0.0),
}


def charts(run: StoredRun) -> dict[str, list[Chart]]:
    """The figures by section, without the empty ones."""
    lines = {key: metric_lines(run.metrics, key) for key in CHARTS}
    lines["seconds"] = _phase_lines(run.metrics)
    lines["loss"] = _loss_lines(run.metrics)
    lines["nfe"] += _unpruned(lines["nfe"], run.unpruned_calls)
    if all(row.get("accuracy/anchored") is None for row in run.metrics):
        # nothing is anchored: all are blank
        lines["accuracy"] = [line for line in lines["accuracy"] if line.label != "blank"]
    result = {"Learning": [_held_out(run.evals)]}
    for key, plan in CHARTS.items():
        result.setdefault(plan.section, []).append(_planned(key, plan, lines[key]))
    calls = spent_by(run.metrics, "calls/total")
    result["Cost"].append(_held_out(run.evals, calls, "denoiser calls"))
    filled = {
        s: [_without_empty(c) for c in group if any(x.points for x in c.lines)]
        for s, group in result.items()
    }
    return {section: group for section, group in filled.items() if group}


def metric_lines(metrics: Sequence[Row], chart: str) -> list[Line]:
    """A line per key of the chart; the parts of the reward follow their sum."""
    labels = labelled(chart)
    if chart == "reward":
        parts = sorted({key for row in metrics for key in row if is_part(key)})
        labels |= {key: key.removeprefix("reward/") for key in parts}
    return [metric_line(metrics, key, label) for key, label in labels.items()]


def metric_line(
    metrics: Sequence[Row], key: str, label: str, at: Mapping[float, float] | None = None
) -> Line:
    """A metric by step, or by what ``at`` says that the step had cost."""
    points = []
    for row in metrics:
        step = step_of(row)
        x = step if at is None or step is None else at.get(step)
        y = number(row, key)
        if x is not None and y is not None:
            points.append((x, y))
    return Line(label=label, points=points)


def eval_line_of(
    rows: Sequence[Row], label: str, at: Mapping[float, float] | None = None, *, apart: bool = False
) -> Line:
    """Accuracy with intervals of eval rows, by step or by what the step had cost."""
    points = []
    bars = []
    for row in rows:
        step = step_of(row)
        x = step if at is None or step is None else at.get(step)
        y = number(row, "accuracy")
        if x is not None and y is not None:
            points.append((x, y))
            bars.append((x, *(estimate(row) or (y, y, y))[1:]))
    return Line(label=label, points=points, bars=bars, apart=apart)


def _held_out(
    evals: Sequence[Row], at: Mapping[float, float] | None = None, x: str = "step"
) -> Chart:
    """Per split and weights a line; the base's row starts every line of its split. The test
    problems are decoded before and after only: dots that are not joined.
    """
    kinds = dict.fromkeys((str(r.get("split")), str(r.get("weights"))) for r in evals)
    later = {split for split, weights in kinds if weights != "base"}
    lines = []
    for split, weights in sorted(kinds, key=lambda kind: (kind[0] == "test", kind)):
        if weights == "base" and split in later:
            continue
        wanted = ("base", weights)
        rows = [r for r in evals if r.get("split") == split and r.get("weights") in wanted]
        lines.append(eval_line_of(rows, f"{split}, {weights}", at, apart=split == "test"))
    title = "Held-out accuracy" if x == "step" else "Held-out accuracy by cost"
    hint = "Greedy, without anchors; bars: 95% intervals."
    return Chart(title=title, lines=lines, x=x, floor=0.0, is_share=True, hint=hint)


def _planned(key: str, plan: Plan, lines: Sequence[Line]) -> Chart:
    """A chart of the table, with its healthy range in words and, where it is one, as a band."""
    metrics = [metric for metric in STEP if metric.chart == key]
    healthy = [metric.healthy for metric in metrics if metric.healthy]
    ranges = [(m.low, m.high) for m in metrics if m.low is not None and m.high is not None]
    alone = len(metrics) == 1 and ranges
    return Chart(
        title=plan.title,
        lines=lines,
        floor=plan.floor,
        is_share=plan.is_share,
        stacked=plan.stacked,
        band=ranges[0] if alone else None,
        hint=" ".join([plan.hint, f"Healthy: {'; '.join(healthy)}." if healthy else ""]).strip(),
    )


def _unpruned(lines: Sequence[Line], calls: int | None) -> list[Line]:
    """A level line: the calls of a blank rollout that nothing shortens."""
    points = [point for line in lines for point in line.points]
    if calls is None or not points:
        return []
    xs = sorted({points[0][0], points[-1][0]})
    return [Line(label="without pruning", points=[(x, float(calls)) for x in xs])]


def _phase_lines(metrics: Sequence[Row]) -> list[Line]:
    """Seconds of each phase, means over at most 80 stretches; a step without a phase spent 0 s in
    it.
    """
    rows = [row for row in metrics if step_of(row) is not None]
    lines = []
    for key, name in PHASES.items():
        values = [number(row, key) for row in rows]
        if any(values):
            points = [
                (step_of(row) or 0.0, value or 0.0) for row, value in zip(rows, values, strict=True)
            ]
            lines.append(Line(label=name, points=thin(points, 80)))
    return lines


def _loss_lines(metrics: Sequence[Row]) -> list[Line]:
    """Of a supervised run: a line per part of its data."""
    keys = sorted({key for row in metrics for key in row if key.startswith("loss/")})
    return [metric_line(metrics, key, key.removeprefix("loss/")) for key in keys]


def _without_empty(chart: Chart) -> Chart:
    return replace(chart, lines=[line for line in chart.lines if line.points])
