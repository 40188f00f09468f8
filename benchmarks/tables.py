"""Write the tables of README.md and of docs/{recipes,diffpo,variance}.md from the committed results
in benchmarks/.

    python benchmarks/tables.py

Each table stands between ``<!-- name -->`` and ``<!-- /name -->``; a test checks that the committed
pages are up to date.
"""

from __future__ import annotations

import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("recipes", "diffpo", "variance")),
)
# The arms of DiFFPO's study in the order of their table, and what each is.
DIFFPO = {
    "diffpo-mf,estimator.p_mask_prompt=0.15": "diffu-GRPO (prompt masking)",
    "diffpo-mf": "mean field",
    "diffpo-mf-is": "mean field, weights",
    "diffpo-2mf": "2-MF",
    "diffpo-2mf-is": "2-MF, weights",
    "diffpo-2mf-is,decode.gamma=0.1": "2-MF, weights, gamma 0.1",
    "diffpo-2mf-is,decode.gamma=0.003": "2-MF, weights, gamma 0.003",
    "diffpo-sampler": "sampler alone",
    "diffpo-joint": "policy and sampler",
}


def main() -> None:
    """Rewrite the pages."""
    for page in PAGES:
        page.write_text(fill(page.read_text()))


def fill(text: str) -> str:
    """``text`` with every marked table replaced by the one from the results."""
    tables = {
        "demo": demo_table,
        "study": partial(study_tables, "study"),
        "blocks": partial(study_tables, "blocks"),
        "bench": bench_table,
        "variance": variance_tables,
    }
    tables |= {"diffpo": diffpo_table}
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if pattern.search(text):
            rows = table()
            text = pattern.sub(lambda m, rows=rows: m.group(1) + rows + m.group(2), text)
    return text


def demo_table() -> str:
    """One row per run of `unmaskrl train sudoku-mini`."""
    head = (
        "| run | before | after, raw | after, EMA | 95% interval | calls per answer | steps | "
        "wall time |\n"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|\n"]
    for path in sorted((ROOT / "benchmarks" / "demo").glob("*.json")):
        s = json.loads(path.read_text())
        raw = s["after"]["raw"]
        ema = s["after"]["ema"]
        name = f"seed {s['seed']}" if path.stem.startswith("seed") else f"control, seed {s['seed']}"
        cells = [
            percent(s["before"]["accuracy"]),
            percent(raw["accuracy"]),
            percent(ema["accuracy"]),
        ]
        cells += [
            f"{100 * ema['accuracy_low']:.1f} to {100 * ema['accuracy_high']:.1f}",
            f"{ema['nfe']:.1f}",
        ]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {s['steps']} | {s['wall_minutes']:.1f} min |\n"
        )
    return "".join(lines)


def study_tables(kind: str) -> str:
    """One table per file ``benchmarks/KIND-*.json``: an arm per row, mean and range over seeds."""
    paths = sorted((ROOT / "benchmarks").glob(f"{kind}-*.json"))
    return "".join(study_table(path) for path in paths)


def study_table(path: Path) -> str:
    """Accuracies, cost, and accuracy at the number of calls that the thriftiest run spent."""
    results: dict[str, Any] = json.loads(path.read_text())
    arms: dict[str, list[dict[str, Any]]] = {}
    for key, result in results.items():
        arms.setdefault(key.rsplit(" seed ", 1)[0], []).append(result)
    limit = min(r["calls"] for r in results.values())
    head = (
        "arm | seeds | before | raw | EMA | pass@4 | by kind (raw) | steps | minutes | calls spent"
    )
    head += f" | at {limit / 1000:.0f}k calls"
    text = f"\n### {path.stem.partition('-')[2]}\n\n| {head} |\n{'|---' * 11}|\n"
    for arm, runs in sorted(arms.items()):
        at = [
            max(
                (p for p in r["curve"] if p["calls"] <= limit),
                key=lambda p: p["calls"],
                default=None,
            )
            for r in runs
        ]
        cells = [spread([r[k] for r in runs]) for k in ("before", "raw", "ema", "pass@4")]
        kinds = {
            k.removeprefix("accuracy_"): spread([r["kinds"][k] for r in runs])
            for k in runs[0]["kinds"]
        }
        cells += [", ".join(f"{k} {v}" for k, v in kinds.items()) or "-"]
        cells += [
            f"{mean(runs, 'steps'):.0f}",
            f"{mean(runs, 'minutes'):.1f}",
            f"{mean(runs, 'calls') / 1000:.0f}k",
        ]
        text += (
            f"| {arm.replace(',', ' ')} | {len(runs)} | {' | '.join(cells)} | "
            f"{spread([p['accuracy'] for p in at if p])} |\n"
        )
    return text


def diffpo_table() -> str:
    """An arm of ``benchmarks/diffpo.json`` per row: mean (range) over seeds of accuracy and calls
    per answer, and its cost.
    """
    results: dict[str, Any] = json.loads((ROOT / "benchmarks" / "diffpo.json").read_text())
    lines = [
        "| arm | command | accuracy | calls per answer | steps | calls spent in training "
        "|\n|---|---|---|---|---|---|\n"
    ]
    for arm, label in DIFFPO.items():
        runs = [run for key, run in sorted(results.items()) if key.rsplit(" seed ", 1)[0] == arm]
        calls = [run["nfe"] for run in runs]
        cells = [label, f"`{arm.replace(',', ' ')}`", spread([run["ema"] for run in runs])]
        cells += [f"{sum(calls) / len(calls):.1f} ({min(calls):.1f}..{max(calls):.1f})"]
        cells += [f"{mean(runs, 'steps'):.0f}", f"{mean(runs, 'calls') / 1000:.0f}k"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def bench_table() -> str:
    """Ratios of `make bench` (CPU time, pages reused) for the rows that matter to a reader."""
    rows = json.loads((ROOT / "benchmarks" / "cpu.json").read_text())["rows"]
    wanted = (
        "greedy rollout",
        "sampled rollout",
        "ELBO forward + backward",
        "whole step",
        "rollout, early EOS",
    )
    text = "| | 126,464 tokens, small body | 2,048 tokens, LLaDA's proportions |\n|---|---|---|\n"
    for what in wanted:
        cells = [bench_cell(r) for r in rows if r["what"] == what and r["malloc"] == "pages reused"]
        text += f"| {what} | {' | '.join(cells)} |\n"
    memory = [f"1/{r['ratio']:.0f}" for r in rows if r["what"] == "loss memory"]
    return text + f"| peak memory of the loss, of full logits | {' | '.join(memory)} |\n"


def bench_cell(row: dict[str, Any]) -> str:
    """A ratio and its spread."""
    text = f"{row['ratio_cpu']:.2f}x +- {100 * row['spread_cpu']:.0f}%"
    return text if row["verdict"] == "faster" else f"{text} (no difference)"


def variance_tables() -> str:
    """One table per file ``benchmarks/variance*.json``: what was rolled out, then a row per
    estimator and version.
    """
    paths = sorted((ROOT / "benchmarks").glob("variance*.json"), key=lambda path: path.stem)
    return "".join(variance_table(json.loads(path.read_text())) for path in paths)


def variance_table(r: dict[str, Any]) -> str:
    """Means over rows and, in brackets, the ratio to "full" with its 95% interval."""
    s = r["rollouts"]
    exit_at = r["decode"]["exit_at"]
    text = (
        f"\n**{r['task']}**, `--keep {r['keep']} --select-anchors {r['select']} --exit-at "
        f"{exit_at}`: {r['num_rows']} "
        f"completions of {r['num_problems']} problems, {r['draws']} draws. On average "
        f"{s['tokens']:.1f} tokens, "
        f"{s['anchors']:.1f} of them anchors, {s['exit_tokens']:.1f} filled by the exit; "
        f"{percent(s['accuracy'])} right.\n\n"
        "| estimator | version | canvases per draw | mean (nats) | variance (nats^2) | / f^2 | / "
        "c^2 | rows that rose |\n"
        f"{'|---' * 8}|\n"
    )
    for estimator in r["estimators"]:
        for version, v in estimator["versions"].items():
            cells = [f"{v['canvases']:.1f}", f"{v['mean']:.2f}"]
            cells += [variance_cell(v, key) for key in ("variance", "per_free", "per_token")]
            cells.append(
                ""
                if version == "full"
                else f"{100 * v['rose']:.0f}% ({100 * v['rose_clearly']:.0f}%)"
            )
            text += f"| `{estimator['name']}` | {version} | {' | '.join(cells)} |\n"
    return text + "\n"


def variance_cell(version: dict[str, Any], key: str) -> str:
    """A mean variance and its ratio to that of "full"."""
    ratio = version.get("ratio", {}).get(key)
    text = f"{version[key]:.3g}"
    return text if ratio is None else f"{text} ({ratio[0]:.2f}: {ratio[1]:.2f} to {ratio[2]:.2f})"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Mean of a figure over runs."""
    return statistics.mean(run[key] for run in runs)


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}%"


def spread(values: list[float]) -> str:
    """Mean in percent and, for several seeds, the range."""
    if not values:
        return "-"
    middle = f"{100 * statistics.mean(values):.1f}"
    return (
        middle
        if len(values) == 1
        else f"{middle} ({100 * min(values):.1f} to {100 * max(values):.1f})"
    )


if __name__ == "__main__":
    main()
