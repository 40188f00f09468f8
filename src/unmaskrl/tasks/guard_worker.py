"""The worker process of guard.py: a script (python -P), not a module to import. Standard library only.

It reads one JSON list of arguments per line and answers one JSON object per line: {"value": ...} or {"error": "..."}.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE = Path(__file__).parents[1]
# What a verifier of text has no reason to do. Imports need os.listdir and reading files.
DENIED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "ftplib.", "urllib.", "http.", "smtplib.")
ALLOWED = {"os.listdir", "os.scandir"}


def load(target: str) -> Callable[..., Any]:
    """The function "module:function"."""
    module, _, name = target.partition(":")
    if module.startswith("unmaskrl.tasks."):
        # A bare package, since the real one imports torch: seconds of start-up and gigabytes of address space.
        package = types.ModuleType("unmaskrl")
        package.__path__ = [str(PACKAGE)]
        sys.modules["unmaskrl"] = package
    return getattr(importlib.import_module(module), name)


def limit_memory(megabytes: int) -> None:
    """At most ``megabytes`` of address space beyond what the imports took; files cannot grow, no core dumps."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        # No /proc (macOS): the imports count as well.
        pages = 0
    total = pages * resource.getpagesize() + megabytes * 2**20
    for kind, limit in ((resource.RLIMIT_AS, total), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            # The system sets a lower limit already, or has none of this kind.
            continue


def forbid(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: no processes, sockets, signals or written files, so that a scorer that evaluates text can do less harm."""
    if event == "open":
        mode, flags = args[1], args[2]
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            raise PermissionError("the guard's worker writes no files")
    elif event.startswith(DENIED) and event not in ALLOWED:
        raise PermissionError(f"the guard's worker may not {event}")


def describe(error: BaseException) -> str:
    """One line; a ValueError, whose text is meant for people, without its type."""
    text = (str(error).splitlines() or [""])[0][:400]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def send(channel: BinaryIO, message: dict[str, Any]) -> None:
    """One JSON object and a line end."""
    channel.write(json.dumps(message).encode("ascii") + b"\n")
    channel.flush()


def answer(function: Callable[..., Any], line: bytes) -> dict[str, Any]:
    """Call the function. Everything it raises is an answer, SystemExit and MemoryError included."""
    try:
        message = {"value": function(*json.loads(line))}
        json.dumps(message)
    except BaseException as error:
        return {"error": describe(error)}
    return message


def main() -> None:
    """Load the target, say so, then serve until the pipe closes."""
    config = json.loads(sys.argv[1])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What the target prints or reads must not mix with the protocol.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.path[:] = config["path"]
    try:
        function = load(config["target"])
    except BaseException as error:
        send(replies, {"error": describe(error)})
        return
    limit_memory(config["megabytes"])
    sys.dont_write_bytecode = True
    sys.addaudithook(forbid)
    send(replies, {"value": "ready"})
    for line in requests:
        seconds = float(line)
        # The parent's clock comes first; this one ends a worker whose parent is gone (SIGPROF kills, in C code too).
        signal.setitimer(signal.ITIMER_PROF, seconds + 1.0)
        message = answer(function, requests.readline())
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        send(replies, message)


if __name__ == "__main__":
    main()
