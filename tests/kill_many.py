"""Kill runs with SIGKILL at random times and at chosen moments, resume them, and compare with a run
that was left alone.

By hand: ``python tests/kill_many.py --kills 60 --seed 1``; the suite runs a few. Every run is a
process of its own, forked after the imports, so that most kills hit a run and not its start. Exit
code 1, and a line per difference, if not bit-equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SETTINGS = (
    "train.steps=4 train.prompts_per_step=2 train.group_size=4 train.num_iterations=2 "
    "run.save_every=1 run.threads=1 "
    "run.log_with=[] run.keep_checkpoints=2 run.probe=false eval.size=4 eval.size_during=2 "
    "eval.every=2 decode.steps=10 "
    "task.train_size=20"
).split()
LOGS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
# A kill falls when such a file appears (it is newer than the process), or at a random time.
MOMENTS = (
    "checkpoints/.partial-*",
    "checkpoints/.partial-*/state.json",
    "checkpoints/update-000005",
    "checkpoints/update-000008",
    "metrics.jsonl",
    "eval.jsonl",
    "model/.model.safetensors.*.part",
    "model/decode.json",
    "model-raw/.*.part",
    "model-raw/decode.json",
    ".summary.json.*.part",
    "summary.json",
    ".report.html.*.part",
    "report.html",
)


def start(out: Path, *words: str) -> int:
    """Fork a run (resumed if there is one) and return its process id."""
    flags = ["--resume"] if (out / "config.yaml").exists() else []
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    from unmaskrl.cli.main import main

    code = 1
    try:
        code = main(
            ["train", "sudoku-mini", *SETTINGS, *words, f"run.out={out}", "--quiet", *flags]
        )
    finally:
        os._exit(code)


def finish(out: Path) -> int:
    """Run to the end; the exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(out), 0)[1])


def kill(out: Path, moment: str | None, delay: float, limit: float) -> str:
    """Start a run and kill it when ``moment`` has come and ``delay`` seconds have gone by; where it
    was, or "ended".
    """
    began = time.time_ns()
    child = start(out)
    deadline = time.monotonic() + limit
    while moment is not None and time.monotonic() < deadline and not newer(out, moment, began):
        if os.waitpid(child, os.WNOHANG)[0]:
            return "ended"
        time.sleep(0.001)
    if moment is None or delay:
        time.sleep(delay)
    if os.waitpid(child, os.WNOHANG)[0]:
        return "ended"
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return where(out, began) if code == -signal.SIGKILL else "ended"


def newer(out: Path, pattern: str, began: int) -> bool:
    """Whether a file of that name was changed after ``began``."""
    for path in out.glob(pattern):
        try:
            if path.stat().st_mtime_ns > began:
                return True
        except FileNotFoundError:  # renamed in the meantime
            continue
    return False


def where(out: Path, began: int) -> str:
    """What the killed process was doing, by what it left."""
    for name, pattern in {
        "a checkpoint half written": "checkpoints/.partial-*",
        "the report half written": ".report.html.*.part",
        "the report written": "report.html",
        "the summary written": "summary.json",
        "a model half written": "model*/.*.part",
        "a model written": "model*/decode.json",
        "between checkpoints": "checkpoints/update-*",
        "steps without a checkpoint": "metrics.jsonl",
        "the first evaluation": "eval.jsonl",
    }.items():
        if newer(out, pattern, began):
            return name
    return "loading"


def rows(path: Path) -> list[dict]:
    """A log without times."""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept]


def differences(run: Path, straight: Path) -> Iterator[str]:
    """What is not as in the run that was left alone: logs, every file of the models, tensors of the
    last checkpoint, litter.
    """
    for name in LOGS:
        if rows(run / name) != rows(straight / name):
            yield name
    for folder in ("model", "model-raw", "checkpoints/update-000008"):
        for path in sorted((straight / folder).iterdir()):
            if (
                path.name != "state.json"
                and (run / folder / path.name).read_bytes() != path.read_bytes()
            ):
                yield f"{folder}/{path.name}"
    for name in ("summary.json", "report.html", "config.yaml"):
        if not (run / name).is_file():
            yield f"{name} is missing"
    for path in run.rglob("*"):
        if path.name.endswith((".part", ".partial")) or path.name.startswith(
            (".partial", ".lock", "damaged")
        ):
            yield f"litter: {path.relative_to(run)}"


def chain(out: Path, kills: int, draw: random.Random, seconds: float, hits: Counter[str]) -> bool:
    """Kill one run several times; whether its last part ended well."""
    for _ in range(kills):
        moment = draw.choice(MOMENTS) if draw.random() < 0.6 else None
        delay = (
            draw.uniform(0.1, 0.7) * seconds
            if moment is None
            else draw.choice((0.0, 0.0, draw.uniform(0, 0.05 * seconds)))
        )
        found = kill(out, moment, delay, limit=20 * seconds + 60)
        hits[found] += 1
        sys.stderr.write(f"{out.name}: {moment or 'any time'}: {found}\n")
        if found == "ended":
            break
    return finish(out) == 0


def main() -> int:
    """Chains of a few kills until there were enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # before the forks: what a run imports on its way too
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401

    import unmaskrl.training.loop  # noqa: F401

    draw = random.Random(args.seed)
    hits = Counter[str]()
    bad = []
    chains = 0
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    straight = work / "straight"
    began = time.monotonic()
    if finish(straight) != 0:
        sys.stdout.write(
            f"the run that was left alone failed: {straight.with_suffix('.log').read_text()}\n"
        )
        return 1
    seconds = time.monotonic() - began
    while sum(hits.values()) - hits["ended"] < args.kills and chains < 4 * args.kills:
        chains += 1
        out = work / f"run-{chains}"
        wanted = min(draw.randint(2, 6), args.kills - sum(hits.values()) + hits["ended"])
        if chain(out, wanted, draw, seconds, hits):
            bad += [f"{out}: {found}" for found in differences(out, straight)]
        else:
            bad.append(f"{out} failed: {out.with_suffix('.log').read_text()}")
    for name, count in hits.most_common():
        sys.stdout.write(f"{count:4} {name}\n")
    killed = sum(hits.values()) - hits["ended"]
    sys.stdout.write(
        f"{killed} kills in {chains} runs, {len(bad)} differences (a run alone: {seconds:.1f} s)\n"
    )
    sys.stdout.writelines(f"{line}\n" for line in bad)
    if not bad:
        shutil.rmtree(work)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
