"""What the commands share: threads, devices, schedules, logs."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .files import append_text, json_text

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


def installed(*packages: str) -> dict[str, str]:
    """Versions by name; "unknown" where a package has no metadata, as when this one runs from a source folder."""
    found = {}
    for name in packages:
        try:
            found[name] = __version__ if name == "unmaskrl" else version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows, one JSON object per line, in one write."""
    append_text(path, "".join(json_text(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a JSONL file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{path}:{number} is no JSON object; correct or delete that line") from None
    return rows


def check_output(path: str | Path, option: str) -> None:
    """Refuse, before any work is done, a file that could not be written at the end."""
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {file.parent} does not exist; make it first")
    if file.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
