"""Training runs that tests start, stop, kill and compare."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds: far beyond what a command takes, far below a day


def start(words: Sequence[str], **environment: str) -> Started:
    """``unmaskrl WORDS`` in a process of its own, which hears signals; its report is not drawn.

    It is forked from a server that has imported what commands need: a fresh interpreter takes four
    seconds until then, longer than most runs here. ``fresh`` starts one.
    """
    return Started(words, {**os.environ, **environment})


def fresh(words: Sequence[str]) -> subprocess.Popen[str]:
    """``python -m unmaskrl.cli WORDS``, the command as users start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "unmaskrl.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )


class Started:
    """A command in a forked process; the methods are those of ``subprocess.Popen``."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = _server().Process(
            target=_run, args=(list(words), self.folder.name, os.getcwd(), environment)
        )
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, signum)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, once it has ended; it is killed at ``timeout``."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired("unmaskrl", timeout or 0)
        out, err = (Path(self.folder.name, name).read_text() for name in ("out", "err"))
        self.folder.cleanup()
        return out, err


def _server() -> Any:
    """Where processes are forked: started with the first, before which it needs the tests' path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.undrawn"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), before or ""])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _run(words: list[str], folder: str, here: str, environment: dict[str, str]) -> None:
    """The command in the forked process, with the streams, folder and variables that it is
    given.
    """
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    hear_signals()
    code = import_module("tests.undrawn").undrawn(words)  # loaded by the server, heavy elsewhere
    atexit._run_exitfuncs()  # a forked process leaves without them
    sys.exit(code)


def hear_signals() -> None:
    """A test run in the background may have been told to ignore SIGINT, and children inherit
    that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def two_ranks(words: Sequence[str]) -> list[Started]:
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


def ended(ranks: list[Started]) -> list[tuple[int | None, str, str]]:
    """Exit code, standard output and standard error of each process, once all have ended."""
    said = [rank.communicate(timeout=LIMIT) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def wait_until(ready: Callable[[], bool], process: Started | subprocess.Popen[str]) -> None:
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
