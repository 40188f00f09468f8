"""Pages that are generated from tables in the code: ``python dev/pages.py`` writes them.

``--check`` writes nothing and fails if a page is not what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from unmaskrl.recipes.reference import Setting, components, settings, sft_settings
from unmaskrl.reporting.curves import CHARTS
from unmaskrl.reporting.metrics import EVALUATION, STEP, SUPERVISED, Metric

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- written by dev/pages.py; change the descriptions in src/unmaskrl/recipes/schema.py -->"

METRICS_HEAD = """# Metrics

Every figure that a run logs. This page is made from `src/unmaskrl/reporting/metrics.py` by
`python dev/pages.py`; edit the table there.

- `metrics.jsonl` has one line per step, `eval.jsonl` one per evaluation. Trackers get the same.
- `null` means that there was nothing to measure, for instance no anchored rollout in the step.
- **Healthy** ranges are rules of thumb from our runs on small models. They are no limits.
- **Processes** says how the figures of several processes become one. `sum`: every process holds
  its part of the total (of a mean: its terms, divided by the count of all). `mean` and `max`: of
  what the processes measured. `same`: it is the same in all of them.
- **Updates** says the same for the inner updates of a step (`train.num_iterations`).
- A loss of your own may return more figures. They are logged under their names, added up over
  processes and averaged over updates.
- A row call is one sequence that goes through the denoiser once.
"""


def settings_page() -> str:
    """Every setting of a recipe, by section; components with their own settings."""
    lines = [
        "# Settings",
        "",
        NOTE,
        "",
        "Every setting of a recipe. On the command line it is written `section.key=value`; in a",
        "YAML file it stands in its section. `unmaskrl settings NAME` shows the same, and",
        "`unmaskrl check RECIPE` shows what a recipe sets.",
        "",
    ]
    for section, rows in groupby(settings(), key=lambda one: one.name.partition(".")[0]):
        rows = list(rows)
        lines += [f"## {section}", "", *_setting_table(rows), ""]
        for name, (meaning, keys) in components(section).items():
            lines += [f"**`{section}.name={name}`**: {_text(meaning)}", ""]
            if keys:
                lines += [*_setting_table(keys), ""]
    lines += ["## Only for `unmaskrl sft`", "", *_setting_table(sft_settings())]
    return "\n".join(lines).rstrip() + "\n"


def metrics_page() -> str:
    """Every figure that a run logs, by file and chart."""
    lines = [METRICS_HEAD, "## metrics.jsonl: one line per step", ""]
    sections = {"": [one for one in STEP if not one.chart]}
    for key, plan in CHARTS.items():
        sections.setdefault(plan.section, []).extend(one for one in STEP if one.chart == key)
    for section, metrics in sections.items():
        title = f"{section}, with a chart in the report" if section else "Without a chart"
        lines += [f"### {title}", "", *_metric_table(metrics), ""]
    for title, rows in (
        ("eval.jsonl: one line per evaluation", EVALUATION),
        ("metrics.jsonl of `unmaskrl sft`", SUPERVISED),
    ):
        cells = [(f"`{key}`", unit, meaning) for key, unit, meaning in rows]
        lines += [f"## {title}", "", *_table(("key", "unit", "meaning"), cells), ""]
    return "\n".join(lines).rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page, "metrics.md": metrics_page}


def _setting_table(rows: list[Setting]) -> list[str]:
    with_meaning = any(row.meaning for row in rows)
    head = ["setting", "default", "values", *(["meaning"] if with_meaning else [])]
    cells = [
        [f"`{row.name}`", f"`{row.default}`", row.values, *([row.meaning] if with_meaning else [])]
        for row in rows
    ]
    return _table(head, cells)


def _metric_table(metrics: list[Metric]) -> list[str]:
    head = ("key", "unit", "meaning", "healthy", "processes", "updates")
    cells = [(f"`{m.key}`", m.unit, m.meaning, m.healthy, m.ranks, m.updates) for m in metrics]
    return _table(head, cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_text, row))} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]


def _text(words: str) -> str:
    return words.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def main(words: list[str]) -> int:
    """Write the pages, or with --check compare them; the exit code."""
    stale = []
    for name, page in PAGES.items():
        path = DOCS / name
        text = page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in words:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in words:
        sys.stderr.write(f"not as generated: {', '.join(stale)}; run python dev/pages.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
