"""Training runs that tests start, stop, kill and compare."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds: far beyond what a command takes, far below a day


def start(
    words: Sequence[str], module: str = "tests.undrawn", **environment: str
) -> subprocess.Popen[str]:
    """``unmaskrl WORDS`` in a process of its own, which hears signals; its report is not drawn,
    unless ``module`` is the command's own.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        preexec_fn=hear_signals,
    )


def hear_signals() -> None:
    """A test run in the background may have been told to ignore SIGINT, and children inherit
    that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def two_ranks(words: Sequence[str]) -> list[subprocess.Popen[str]]:
    """The same command on two processes, as a launcher would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    return [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each process, once all have ended."""
    said = [rank.communicate(timeout=LIMIT) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return when ``ready``, or when the process has ended."""
    deadline = time.monotonic() + LIMIT
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(path: Path) -> list[dict[str, Any]]:
    """JSONL rows without anything that is a time."""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept]


def assert_same_run(run: Path, straight: Path) -> None:
    """The same logs, but for times, and bit-equal weights."""
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        assert rows(run / name) == rows(straight / name), name
    for name in ("model", "model-raw"):
        ours, theirs = (load_file(p / name / "model.safetensors") for p in (run, straight))
        assert ours.keys() == theirs.keys()
        assert all(ours[k].equal(theirs[k]) for k in theirs), name
