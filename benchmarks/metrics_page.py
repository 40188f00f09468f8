"""docs/metrics.md from the table in the code: ``python -m benchmarks.metrics_page``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.theory_page import markdown
from unmaskrl.reporting.curves import CHARTS
from unmaskrl.reporting.metrics import EVALUATION, STEP, SUPERVISED, Metric

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

Every figure that a run logs. This page is made from `src/unmaskrl/reporting/metrics.py` by
`python -m benchmarks.metrics_page`; edit the table there.

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


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## metrics.jsonl: one line per step\n"]
    sections = {"": [m for m in STEP if not m.chart]}
    for key, plan in CHARTS.items():
        sections.setdefault(plan.section, []).extend(m for m in STEP if m.chart == key)
    for section, metrics in sections.items():
        title = f"{section}, with a chart in the report" if section else "Without a chart"
        parts.append(f"\n### {title}\n\n{step_table(metrics)}")
    for title, rows in (
        ("eval.jsonl: one line per evaluation", EVALUATION),
        ("metrics.jsonl of `unmaskrl sft`", SUPERVISED),
    ):
        lines = [(f"`{key}`", unit, meaning) for key, unit, meaning in rows]
        parts.append(f"\n## {title}\n\n{markdown(('key', 'unit', 'meaning'), lines)}")
    return "".join(parts)


def step_table(metrics: list[Metric]) -> str:
    """Keys with all that the table says of them."""
    head = ("key", "unit", "meaning", "healthy", "processes", "updates")
    rows = [
        (f"`{m.key}`", m.unit, cell(m.meaning), cell(m.healthy), m.ranks, m.updates)
        for m in metrics
    ]
    return markdown(head, rows)


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
