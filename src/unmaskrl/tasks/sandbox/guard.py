"""Run a function on hostile text with a time and a memory limit, in a worker process that outlives
its calls.

For verifiers of other packages (computer algebra, reasoning-gym), which a completion can keep busy
for hours or feed until memory is gone. Arguments and results travel as JSON lines over pipes, each
reply with the random number of its call: no pickle, no signal handlers, no threads, so a guard
works in any thread. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("guard_worker.py")
# Imports of computer algebra take seconds on a slow machine.
START_SECONDS = 120.0
_RAISE = object()


class Guard:
    """Calls ``target`` ("module:function") in a worker, at most ``seconds`` and about ``megabytes``
    for each call.

    The worker starts with the first call, imports the target once, and is killed and replaced after
    a call that takes too long, brings it down or is answered with another number than its own.
    ``megabytes`` is address space beyond what the imports took. Processes, sockets, signals to
    others and written files are refused in the worker (a hurdle, not a sandbox). Hashing is fixed
    (PYTHONHASHSEED=0), so that sets have the same order in every worker. ``timeouts``, ``crashes``
    and ``errors`` count the calls that ended so; ``last_error`` says why the last one failed.
    """

    def __init__(self, target: str, *, seconds: float = 2.0, megabytes: int = 1024) -> None:
        if target.count(":") != 1:
            raise ValueError(f"target is {target!r}, expected 'module:function'")
        if not seconds > 0 or megabytes < 1:
            raise ValueError(
                f"got seconds={seconds}, megabytes={megabytes}: expected positive limits"
            )
        self.target = target
        self.seconds = float(seconds)
        self.megabytes = int(megabytes)
        self.timeouts = self.crashes = self.errors = 0
        self.last_error = ""
        self._forget()

    def call(self, *args: Any, default: Any = _RAISE, seconds: float | None = None) -> Any:
        """target(*args), or ``default`` if it raises, takes longer than ``seconds`` or brings the
        worker down.

        ``args`` and the result must be JSON (surrogates and NULs in texts are fine). Without a
        default those cases raise ValueError. A worker that cannot start (a missing package) always
        does.
        """
        limit = self.seconds if seconds is None else float(seconds)
        number = secrets.token_hex(16).encode("ascii")
        request = b"%b\n%b\n%b\n" % (
            str(limit).encode("ascii"),
            number,
            json.dumps(args).encode("ascii"),
        )
        if self._owner != os.getpid():
            # After a fork the pipes belong to the parent.
            self._forget()
        with self._lock:
            if self._process is None:
                self._start()
            reply = self._exchange(request, number, limit)
        if "value" in reply:
            return reply["value"]
        self.last_error = reply["error"]
        if default is _RAISE:
            raise ValueError(reply["error"])
        return default

    def close(self) -> None:
        """End the worker; the next call starts another."""
        if self._owner == os.getpid() and self._finalizer is not None:
            self._finalizer()
        self._process = None
        self._finalizer = None
        self._rest = b""

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._rest = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None

    def _start(self) -> None:
        config = {
            "target": self.target,
            "megabytes": self.megabytes,
            "path": [os.path.abspath(path) for path in sys.path],
        }
        # One thread: every thread of a numerics library reserves address space.
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        # -P: the folder of the script holds modules named like others' packages.
        command = [sys.executable, "-P", str(WORKER), json.dumps(config)]
        # A new session: Ctrl-C in the terminal is for us alone, and what a worker starts can be
        # killed with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process, os.getpid())
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        reply = self._exchange(b"", b"ready", START_SECONDS)
        if "error" in reply:
            self.close()
            raise ValueError(f"the worker for {self.target} did not start: {reply['error']}")

    def _exchange(self, request: bytes, number: bytes, seconds: float) -> dict[str, Any]:
        """Send a request and wait for the answer; {"error": ...} and no worker if that fails.

        Also if the answer has another number: something in the worker wrote to the channel, and
        what follows is not to be trusted.
        """
        deadline = time.monotonic() + seconds
        try:
            self._write(request, deadline)
            own, _, message = self._read_line(deadline).partition(b" ")
            if own != number or self._rest:
                self.crashes += 1
                self.close()
                return {"error": f"{self.target} wrote to the worker's reply channel"}
            reply = json.loads(message)
        except TimeoutError:
            self.timeouts += 1
            self.close()
            return {"error": f"{self.target} took longer than {seconds:g} s"}
        except (OSError, ValueError):
            self.crashes += 1
            self.close()
            return {
                "error": f"{self.target} brought its worker down (out of memory, or a crash in C "
                "code)"
            }
        self.errors += "error" in reply
        return reply

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        view = memoryview(data)
        while view:
            _wait(pipe, select.POLLOUT, deadline)
            view = view[os.write(pipe, view[:65536]) :]

    def _read_line(self, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            _wait(pipe, select.POLLIN, deadline)
            parts.append(os.read(pipe, 1 << 20))
            if not parts[-1]:
                raise BrokenPipeError("the worker has ended")
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line


def _wait(pipe: int, event: int, deadline: float) -> None:
    """Until the pipe is ready. Raises TimeoutError."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill a worker and all it started; not from a forked copy of its owner."""
    if os.getpid() != owner:
        return
    # It may have ended by itself.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
