"""What the commands share: threads, devices, schedules, run folders."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def set_threads(wanted: int) -> int:
    """Use ``wanted`` CPU threads; 0 times one thread against all cores and keeps the faster.

    A second thread on a busy 2-core machine can be ten times slower than one, so the choice is measured, not guessed.
    """
    if wanted < 0:
        raise ValueError(f"threads is {wanted}; expected a number of CPU threads, or 0 to measure which is fastest")
    if wanted == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        candidates = sorted({1, min(cores, 8)})
        wanted = min(candidates, key=_probe_seconds)
    torch.set_num_threads(wanted)
    return wanted


def _probe_seconds(threads: int) -> float:
    """Median seconds of a small matrix chain, the shape of work of a small model; a tie goes to fewer threads."""
    torch.set_num_threads(threads)
    x, w = torch.ones(4096, 128), torch.full((128, 384), 1e-3)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(8):
            torch.matmul(torch.nn.functional.silu(x @ w), w.T)
        times.append(time.perf_counter() - start)
    return sorted(times)[6] * (1.0 if threads == 1 else 1.1)  # a slow quantile: one stalled call stalls a step


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learning_rate(update: int, share_done: float, *, lr: float, warmup: int, schedule: str) -> float:
    """Rate of the 0-based ``update``: linear warm-up, then constant, or linear or cosine decay to 0 as ``share_done`` -> 1."""
    if update < warmup:
        return lr * (update + 1) / warmup
    if schedule == "linear":
        return lr * (1 - share_done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * share_done))
    return lr


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows, one JSON object per line, in one write."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(text)


def truncate_file(path: Path, size: int) -> None:
    """Cut a log back to ``size`` bytes (where a checkpoint was taken); a missing file counts as empty."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)


def file_size(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a JSONL file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().split("\n")[:-1]:
        if line.strip():
            rows.append(json.loads(line))
    return rows


def check_output(path: str | Path, option: str) -> None:
    """Refuse, before any work is done, a file that could not be written at the end."""
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {file.parent} does not exist; make it first")
    if file.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")


def run_folder(out: str, name: str, seed: int, *, resume: bool, force: bool = False) -> Path:
    """Where a run goes; refuses to mix two runs in one folder. Creates nothing."""
    try:
        folder = Path(out.format(recipe=name, seed=seed))
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(f"train.out {out!r}: only {{recipe}} and {{seed}} are filled in; double other braces") from None
    if folder.is_file():
        raise ValueError(f"train.out {out!r} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (resume or force):
        raise ValueError(f"{folder} already holds a run: add --resume to go on, --force to replace it, or set train.out")
    if resume and not folder.exists():
        raise ValueError(f"--resume: there is no run in {folder}; leave --resume out to start one")
    return folder
