"""One process at a time: a lock file that says who holds it. A dead holder's lock is taken
over.

The file holds machine, process id, and when that process and its machine began: a number that was
given to a later process, or a machine that was started again, is no holder. Of another machine's
process nothing can be known: it is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import host_name, is_alive, json_text, process_start

LOCK = ".lock"
_PATIENCE = 5.0  # seconds, for another process that looks at the lock at the same moment
_held: set[Path] = set()  # by this process


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that this process holds."""

    path: Path

    @classmethod
    def take(cls, path: Path, what: str) -> Lock:
        """Take the lock ``path`` of ``what``; ValueError with the holder if a process holds it."""
        path = path.resolve()
        with _alone(path) as file:
            refuse_holder(path, what, holder(path))
            file.seek(0)
            file.truncate()
            file.write(json_text(_self()).encode())
            file.flush()
            os.fsync(file.fileno())
        _held.add(path)
        return cls(path)

    def is_held(self) -> bool:
        """Whether the file is still there and this process's own."""
        return self.path in _held and holder(self.path) == _self()

    def release(self) -> None:
        """Let go; what is not this process's own any more stays."""
        ours = self.is_held()
        _held.discard(self.path)
        if ours:
            self.path.unlink(missing_ok=True)


@contextmanager
def holding(file: Path | None) -> Iterator[None]:
    """No other process may fill ``file`` meanwhile (its lock is ``.NAME.lock`` beside it); None:
    nothing is held.
    """
    lock = None if file is None else Lock.take(file.with_name(f".{file.name}{LOCK}"), str(file))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def holder(path: Path) -> dict[str, Any] | None:
    """Who a lock file says holds it; None if nobody does or the file was never finished."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def refuse_holder(path: Path, what: str, found: dict[str, Any] | None) -> None:
    """ValueError if the process that a lock names runs, or runs where this one cannot see it."""
    if found is None:
        return
    own = _self()
    pid = found.get("pid")
    if found.get("host") != own["host"]:
        raise ValueError(
            f"{what} is in use by process {pid} of another machine ({found.get('host')}), as "
            f"{path} says; "
            "if nothing runs there any more, delete that file and try again"
        )
    if found.get("boot") != own["boot"] or not isinstance(pid, int):
        return
    if pid == os.getpid():
        if path.resolve() not in _held:
            return
    elif not is_alive(pid, found.get("started")):
        return
    raise ValueError(
        f"{what} is in use by process {pid}: wait until it is done, stop it, or use another folder "
        "or file"
    )


def _self() -> dict[str, Any]:
    return {
        "host": host_name(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "boot": _boot(),
    }


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


@contextmanager
def _alone(path: Path) -> Iterator[Any]:
    """The open lock file, with no other process of this machine between look and write (where the
    system can do that).
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            guarded = _guard(file, deadline)
            if guarded and not _is_same(file, path):
                continue  # its holder deleted it between open and guard
            yield file
            return
        finally:
            file.close()


def _guard(file: Any, deadline: float) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    while time.monotonic() < deadline:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # a file system without such locks
            return False
        else:
            return True
    return False


def _is_same(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
