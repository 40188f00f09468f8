"""Compare recipes: every arm and seed as a process of its own, one thread each, at equal steps or
(--minutes) equal time.

    python benchmarks/study.py --out benchmarks/study.json sudoku-mini-elbo sudoku-mini-stp ...

An arm is a recipe and settings: ``countdown-zero-stp,train.shuffle_advantages=true``. Seeds 0, 1, 2
unless --seeds says else. The JSON holds each run's command, accuracy before and after (raw and EMA
weights, 512 test problems, anchor-free), pass@4, and the validation curve against denoiser calls.
``benchmarks/tables.py`` makes the tables of the docs from it. Times are CPU time of the one-thread
process: other work on the machine does not decide a comparison at equal time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
CPU_CLOCK = (
    "import time; time.perf_counter = time.process_time; from unmaskrl.cli.main import main; main()"
)


def main() -> None:
    """Run what is missing and write the JSON after every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="training time per run; 0: the recipe's own steps",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", default="runs/study")
    parser.add_argument("--out", default="benchmarks/study.json")
    args = parser.parse_args()
    out = Path(args.out)
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    todo = [
        (arm, int(s))
        for s in args.seeds.split(",")
        for arm in args.arms
        if f"{arm} seed {s}" not in results
    ]

    def work(job: tuple[str, int]) -> None:
        arm, seed = job
        results[f"{arm} seed {seed}"] = run_arm(arm, seed, args.minutes, Path(args.runs))
        out.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        sys.stderr.write(f"{arm} seed {seed}: {results[f'{arm} seed {seed}']['ema']:.3f}\n")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))


def run_arm(arm: str, seed: int, minutes: float, runs: Path) -> dict[str, Any]:
    """Train one arm for its recipe's steps, or ``minutes`` of training time, and collect its
    figures.
    """
    recipe, *settings = arm.split(",")
    folder = runs / f"{arm.replace(',', '+').replace('/', '_')}-s{seed}"
    command = ["unmaskrl", "train", recipe, *settings, f"run.seed={seed}"]
    command += [f"train.minutes={minutes}", "train.steps=100000"] if minutes else []
    command += [
        "run.threads=1",
        "run.log_with=[]",
        "eval.every=10",
        "eval.size_during=256",
        f"run.out={folder}",
    ]
    executable = [sys.executable, "-c", CPU_CLOCK]
    subprocess.run(
        [*executable, *command[1:], "--force", "--quiet"],
        check=True,
        env=ENV,
        stdout=subprocess.DEVNULL,
    )
    summary = json.loads((folder / "summary.json").read_text())
    spent = {row["step"]: row["calls/total"] for row in rows(folder / "metrics.jsonl")}
    calls = {0: 0, **spent}
    curve = [
        {"calls": calls[row["step"]], "accuracy": row["accuracy"]}
        for row in rows(folder / "eval.jsonl")
        if row["split"] == "validation"
    ]
    task = json.loads((folder / "model" / "decode.json").read_text()).popitem()[0]
    sampled = folder / "pass.json"
    extra = [
        "eval",
        str(folder / "model-raw"),
        "--task",
        task,
        "--samples",
        "4",
        "--temperature",
        "1",
        "--size",
        "256",
    ]
    subprocess.run(
        [*executable, *extra, "--threads", "1", "--json", str(sampled)],
        check=True,
        env=ENV,
        stdout=subprocess.DEVNULL,
    )
    after = summary["after"]
    return {
        "command": " ".join(command),
        "before": summary["before"]["accuracy"],
        "raw": after["raw"]["accuracy"],
        "ema": after["ema"]["accuracy"],
        "interval": [after["ema"]["accuracy_low"], after["ema"]["accuracy_high"]],
        "kinds": {
            k: v
            for k, v in after["raw"].items()
            if k.startswith("accuracy_") and k[9:] not in ("low", "high")
        },
        "nfe": after["ema"]["nfe"],
        "pass@4": json.loads(sampled.read_text())["pass@4"],
        "steps": summary["steps"],
        "calls": summary["calls"],
        "minutes": summary["minutes"],
        "curve": curve,
    }


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
