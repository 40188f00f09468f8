"""A run folder -> one self-contained HTML file: headline numbers, curves, decodings, how it was
made.

The same run gives the same file. What a run cut short lacks is left out, and whatever its logs hold
is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from .curves import charts
from .pages import drawn, render
from .runs import StoredRun, load_run, mapping, step_of
from .trajectory import EXAMPLES, RAMP, view
from .words import (
    Row,
    decimal,
    duration,
    estimate,
    interval,
    mean,
    number,
    percent,
    preferred,
    verdict,
)

_NUM_PROBLEMS = 4


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` and return its path. Raises ValueError if ``run`` is no run
    folder.
    """
    data = load_run(run)
    results = {"before": data.before, **{f"after, {key}": row for key, row in data.after.items()}}
    page = render(
        "report.html",
        title=data.name,
        settings=settings_line(data.config),
        results=[_result(name, row) for name, row in results.items() if row],
        verdict=verdict(data.before, preferred(data.after))
        if data.before and data.after
        else _unfinished(data),
        cost=cost_line(data),
        effort=" | ".join(_effort(data)),
        sections=drawn(charts(data)),
        problems=_problems(data.samples),
        examples=EXAMPLES,
        ramp=RAMP,
        block_length=data.block_length,
        sessions=[session_facts(session) for session in data.sessions],
        config=data.config_text,
    )
    path = data.folder / "report.html"
    write_text(path, page)
    return path


def _unfinished(run: StoredRun) -> str:
    if "data" in run.config:
        return "A supervised run. What was measured at its end is in eval.json."
    steps = [int(x) for row in run.metrics if (x := step_of(row)) is not None]
    return (
        "This run has no final evaluation; "
        f"{f'its log ends at step {max(steps)}' if steps else 'no step was logged'}."
    )


def _result(name: str, row: Row) -> dict[str, Any]:
    """A row of the table of accuracies."""
    bar = None
    if known := estimate(row):
        share, low, high = known
        bar = {
            "left": f"{100 * low:.1f}",
            "width": f"{100 * (high - low):.1f}",
            "middle": f"{100 * share:.1f}",
        }
    return {
        "name": name,
        "accuracy": percent(number(row, "accuracy")),
        "interval": interval(row),
        "bar": bar,
        "calls": decimal(number(row, "nfe"), 1),
        "tokens": decimal(number(row, "tokens_per_call"), 2),
        "problems": row.get("num_problems", "-"),
    }


def cost_line(run: StoredRun) -> str:
    """What pruning saved: calls of the rollouts as they were run, beside those of a blank canvas
    without exit. Empty if one of them is not known.
    """
    calls = mean(number(row, "nfe/mean") for row in run.metrics)
    whole = run.unpruned_calls
    if calls is None or whole is None:
        return ""
    saved = 1 - calls / whole
    compared = f"{100 * saved:.0f}% fewer" if saved >= 0.005 else "no fewer"
    return (
        f"A rollout took {calls:.1f} denoiser calls on average. Without anchors and exit it takes "
        f"{whole}, if no end of text ends it early: {compared}."
    )


def _effort(run: StoredRun) -> list[str]:
    """Wall time, steps, updates, machine."""
    last = run.metrics[-1] if run.metrics else {}
    minutes = number(run.summary, "minutes")
    seconds = number(last, "seconds")
    seconds = 60 * minutes if minutes is not None else seconds
    facts = [f"wall time {duration(seconds)}"] if seconds is not None else []
    for key in ("steps", "updates", "threads"):
        value = run.summary.get(key, last.get("step" if key == "steps" else key))
        name = key.removesuffix("s") if value == 1 else key
        facts += [f"{value} {name}"] if value is not None else []
    calls = number(last, "calls/total")
    facts += [f"{calls:,.0f} denoiser calls (rows)"] if calls is not None else []
    facts += [
        f"{key} {run.summary[key]}"
        for key in ("device", "seed")
        if run.summary.get(key) is not None
    ]
    return facts


def session_facts(session: Row) -> list[tuple[str, Any]]:
    """When and how the command was started, with what: names and values."""
    facts = [(name, session.get(name)) for name in ("started", "command", "folder")]
    commits = mapping(session.get("commits"))
    facts += [(f"commit of {place}", commit) for place, commit in commits.items()]
    versions = mapping(session.get("versions"))
    facts.append(("versions", ", ".join(f"{name} {text}" for name, text in versions.items())))
    facts += [(name, session.get(name)) for name in ("platform", "processes")]
    return [(name, value) for name, value in facts if value not in (None, "")]


def settings_line(config: Row) -> str:
    """The settings that matter, in one line."""
    shown = {
        "task": None,
        "estimator": None,
        "advantage": None,
        "loss": None,
        "prior": ("name", "select", "keep", "keep_end", "share"),
        "decode": (
            "gen_length",
            "block_length",
            "steps",
            "select",
            "temperature",
            "top_k",
            "top_p",
            "exit_at",
        ),
        "train": ("prompts_per_step", "group_size", "num_iterations", "ema"),
        "optimizer": ("name", "lr"),
        "run": ("seed",),
    }
    parts = []
    for section, keys in shown.items():
        values = mapping(config.get(section))
        if section == "prior" and values.get("name") == "none":
            keys = ("name",)
        picked = {k: values[k] for k in keys or values if values.get(k) is not None}
        words = [str(v) if k == "name" else f"{k}={v}" for k, v in picked.items()]
        parts += [f"{section} {' '.join(words)}"] if words else []
    return "; ".join(parts)


def _problems(samples: Sequence[Row]) -> list[dict[str, Any]]:
    """Test problems at the first and the last step, and the last rollouts with and without
    anchors.
    """
    groups = _test_pairs(samples)
    train = [row for row in samples if row.get("split") == "train"]
    for anchored in (True, False):
        groups += [[row] for row in train if bool(row.get("anchored")) == anchored][-1:]
    return [
        {
            "prompt": str(rows[0].get("prompt", "")).strip(),
            "gold": str(rows[0].get("gold") or "").strip(),
            "views": [view(row) for row in rows],
        }
        for rows in groups
    ]


def _test_pairs(samples: Sequence[Row]) -> list[list[Row]]:
    """First and last sample of the problems that were seen longest."""
    by_id: dict[str, list[Row]] = {}
    for row in samples:
        if str(row.get("split")).startswith("test"):  # test-base, test-raw, test-ema
            by_id.setdefault(str(row.get("id")), []).append(row)
    best = sorted(by_id.values(), key=lambda rows: -len(rows))[:_NUM_PROBLEMS]
    return [[rows[0], rows[-1]] if len(rows) > 1 else rows for rows in best]
