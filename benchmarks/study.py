"""Compare recipes at equal wall time: every arm and seed as a process of its own, one thread each, two side by side.

    python benchmarks/study.py --minutes 2 --out benchmarks/study.json sudoku-mini-elbo sudoku-mini-stp ...

An arm is a recipe and settings: ``countdown-zero-stp,train.shuffle_advantages=true``. Seeds 0, 1, 2 unless --seeds says else.
The JSON holds each run's command, accuracy before and after (raw and EMA weights, 512 test problems, anchor-free), pass@4,
and the validation curve against denoiser calls. ``--table`` prints the markdown tables of docs/recipes.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Run what is missing and write the JSON after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", default="runs/study")
    parser.add_argument("--out", default="benchmarks/study.json")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    out = Path(args.out)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    todo = [(arm, int(s)) for s in args.seeds.split(",") for arm in args.arms if f"{arm} seed {s}" not in results]

    def work(job: tuple[str, int]) -> None:
        arm, seed = job
        results[f"{arm} seed {seed}"] = run_arm(arm, seed, args.minutes, Path(args.runs))
        out.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        sys.stderr.write(f"{arm} seed {seed}: {results[f'{arm} seed {seed}']['ema']:.3f}\n")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    if args.table:
        sys.stdout.write(tables(results))


def run_arm(arm: str, seed: int, minutes: float, runs: Path) -> dict[str, Any]:
    """Train one arm for ``minutes`` of training time (evaluation apart) and collect its figures."""
    recipe, *settings = arm.split(",")
    folder = runs / f"{arm.replace(',', '+').replace('/', '_')}-s{seed}"
    command = ["unmaskrl", "train", recipe, *settings, f"train.seed={seed}", f"train.minutes={minutes}", "train.steps=100000"]
    command += ["train.threads=1", "train.log_with=[]", "eval.every=10", "eval.size_during=256", f"train.out={folder}"]
    executable = [sys.executable, "-m", "unmaskrl.cli"]
    subprocess.run([*executable, *command[1:], "--force", "--quiet"], check=True, env=ENV, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "summary.json").read_text())
    calls = {row["step"]: row["calls/total"] for row in rows(folder / "metrics.jsonl")}
    curve = [
        {"calls": calls[row["step"]], "accuracy": row["accuracy"]}
        for row in rows(folder / "eval.jsonl")
        if row["split"] == "validation"
    ]
    task = json.loads((folder / "model" / "decode.json").read_text()).popitem()[0]
    sampled = folder / "pass.json"
    extra = ["eval", str(folder / "model-raw"), "--task", task, "--samples", "4", "--temperature", "1", "--size", "256"]
    subprocess.run(
        [*executable, *extra, "--threads", "1", "--json", str(sampled)], check=True, env=ENV, stdout=subprocess.DEVNULL
    )
    after = summary["after"]
    return {
        "command": " ".join(command),
        "before": summary["before"]["accuracy"],
        "raw": after["raw"]["accuracy"],
        "ema": after["ema"]["accuracy"],
        "interval": [after["ema"]["accuracy_low"], after["ema"]["accuracy_high"]],
        "kinds": {k: v for k, v in after["raw"].items() if k.startswith("accuracy_") and k[9:] not in ("low", "high")},
        "nfe": after["ema"]["nfe"],
        "pass@4": json.loads(sampled.read_text())["pass@4"],
        "steps": summary["steps"],
        "calls": summary["calls"],
        "minutes": summary["minutes"],
        "curve": curve,
    }


def tables(results: dict[str, Any]) -> str:
    """Markdown: a row per arm with mean and range over seeds, at equal time and at equal calls."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for key, result in results.items():
        arms.setdefault(key.rsplit(" seed ", 1)[0], []).append(result)
    text = ""
    for task in sorted({arm.split(",")[0].rsplit("-", 1)[0].replace("-stp", "") for arm in arms}):
        own = {arm: runs for arm, runs in arms.items() if arm.startswith(task)}
        limit = min(r["calls"] for runs in own.values() for r in runs)
        text += f"\n### {task}\n\n| arm | seeds | before | raw | EMA | pass@4 | calls per answer | steps | calls spent |"
        text += f" at {limit / 1000:.0f}k calls |\n|---|---|---|---|---|---|---|---|---|---|\n"
        for arm, runs in sorted(own.items()):
            at_calls = [
                max((p for p in r["curve"] if p["calls"] <= limit), key=lambda p: p["calls"], default=None) for r in runs
            ]
            cells = [spread([r[k] for r in runs]) for k in ("before", "raw", "ema", "pass@4")]
            cells += [f"{statistics.mean(r['nfe'] for r in runs):.1f}", f"{statistics.mean(r['steps'] for r in runs):.0f}"]
            cells += [
                f"{statistics.mean(r['calls'] for r in runs) / 1000:.0f}k",
                spread([p["accuracy"] for p in at_calls if p]),
            ]
            text += f"| {arm} | {len(runs)} | " + " | ".join(cells) + " |\n"
    return text


def spread(values: list[float]) -> str:
    """Mean in percent and the range over seeds."""
    if not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
