"""The worker process of guard.py: a script (python -P), not a module to import. Standard library
only.

A request is three lines: seconds, a number, a JSON list of arguments. The reply is one: the number
and a JSON object, {"value": ...} or {"error": "..."}.
"""

from __future__ import annotations

import _thread
import importlib
import json
import os
import queue
import resource
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
# What a verifier of text has no reason to do. Imports need to list folders and to read files.
DENIED = (
    *(
        "os.",
        "subprocess.",
        "socket.",
        "shutil.",
        "ctypes.",
        "pty.",
        "ftplib.",
        "urllib.",
        "http.",
        "smtplib.",
    ),
    *(
        "sqlite3.",
        "syslog.",
        "resource.",
        "cpython.",
        "gc.",
        "sys.settrace",
        "sys.setprofile",
        "sys._current_",
    ),
)
ALLOWED = {"os.listdir", "os.scandir", "os.walk"}
# What raises no audit event: it is taken out of every loaded module, and these modules are not
# loaded again.
TAKEN_OUT = {
    "posix": (
        *(
            "mkfifo",
            "mknod",
            "write",
            "writev",
            "pwrite",
            "pwritev",
            "sendfile",
            "splice",
            "copy_file_range",
        ),
        *(
            "read",
            "readv",
            "pread",
            "preadv",
            "pidfd_open",
            "setpgid",
            "setsid",
            "openpty",
            "chroot",
            "unshare",
        ),
    ),
    "_imp": ("create_builtin",),
    "_multiprocessing": ("SemLock", "sem_unlink"),
    "_posixshmem": ("shm_open", "shm_unlink"),
    "_posixsubprocess": ("fork_exec",),
    "_signal": ("pidfd_send_signal",),
}
UNLOADABLE = {
    *TAKEN_OUT,
    "_ctypes",
    "_dbm",
    "_gdbm",
    "_interpreters",
    "_xxsubinterpreters",
    "_testcapi",
    "readline",
}


def load(target: str) -> Callable[..., Any]:
    """The function "module:function"."""
    module, _, name = target.partition(":")
    if module.startswith("unmaskrl.tasks."):
        # A bare package, since the real one imports torch: seconds of start-up and gigabytes of
        # address space.
        package = types.ModuleType("unmaskrl")
        package.__path__ = [str(PACKAGE)]
        sys.modules["unmaskrl"] = package
    return getattr(importlib.import_module(module), name)


def limit_memory(megabytes: int) -> None:
    """At most ``megabytes`` of address space beyond what the imports took; files cannot grow, no
    core dumps.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        # No /proc (macOS): the imports count as well.
        pages = 0
    total = pages * resource.getpagesize() + megabytes * 2**20
    for kind, limit in (
        (resource.RLIMIT_AS, total),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            # The system sets a lower limit already, or has none of this kind.
            continue


def forbid(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: no processes, sockets, signals or written files, so that a scorer that evaluates
    text can do less harm.
    """
    if event == "open":
        path, mode, flags = args
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        changes = isinstance(flags, int) and flags & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        )
        # A number is a file that is open already, such as the channel to the parent.
        if writes or changes or isinstance(path, int):
            raise PermissionError("the guard's worker writes no files")
    elif event == "import":
        if args[0] in UNLOADABLE:
            raise PermissionError(f"the guard's worker may not import {args[0]}")
    elif event.startswith(DENIED) and event not in ALLOWED:
        raise PermissionError(f"the guard's worker may not {event}")


def refused(*_: Any, **__: Any) -> Any:
    """Stands in the place of what was taken out."""
    raise PermissionError("the guard's worker may not call this function")


def take_out() -> None:
    """Replace the functions of TAKEN_OUT in every module that has them, whatever they are called
    there.
    """
    for name in sys.builtin_module_names:
        # Later they cannot be made any more. Those of UNLOADABLE are there already, or are not
        # wanted.
        if name not in UNLOADABLE:
            importlib.import_module(name)
    gone = []
    for name, functions in TAKEN_OUT.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            # Not on this system.
            continue
        gone += [getattr(module, function) for function in functions if hasattr(module, function)]
    taken = {id(function) for function in gone}
    for module in list(sys.modules.values()):
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in taken:
                setattr(module, key, refused)


def describe(error: BaseException) -> str:
    """One line; a ValueError, whose text is meant for people, without its type."""
    text = (str(error).splitlines() or [""])[0][:400]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def answer(function: Callable[..., Any], line: bytes) -> bytes:
    """Call the function; one JSON object. Everything it raises is an answer, SystemExit and
    MemoryError included.
    """
    try:
        return json.dumps({"value": function(*json.loads(line))}).encode("ascii")
    except BaseException as error:
        return json.dumps({"error": describe(error)}).encode("ascii")


def carry(jobs: Callable[[Any], None], results: Callable[[], Any]) -> None:
    """The thread between the pipes and the main thread: requests to ``jobs``, each of its
    ``results`` back with its number.

    The pipes and the number of a call are in this thread's frame only, out of sight of the frames
    below ``main``. What handles them is C code, bound here: replacing a function of some module
    changes nothing in it.
    """
    leave = os._exit
    timer = signal.setitimer
    kind = signal.ITIMER_PROF
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    number = b"ready"
    write = replies.write
    read = requests.readline
    # What the target prints or reads must not mix with the protocol.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    jobs(b"")  # from here on main may forbid
    while True:
        line = b"%b %b\n" % (number, results())
        timer(kind, 0.0)
        while line:
            line = line[write(line) :]
        seconds = read()
        number = read()[:-1]
        request = read()
        if not request:
            leave(0)
        # The parent's clock comes first; this one ends a worker whose parent is gone (SIGPROF
        # kills, in C code too).
        timer(kind, float(seconds) + 1.0)
        jobs(request)


def main() -> None:
    """Load the target, say so, then serve until the pipe closes."""
    config = json.loads(sys.argv[1])
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    results: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    _thread.start_new_thread(carry, (jobs.put, results.get))
    jobs.get()
    sys.path[:] = config["path"]
    function = refused
    try:
        function = load(config["target"])
    except BaseException as error:
        results.put(json.dumps({"error": describe(error)}).encode("ascii"))
    else:
        limit_memory(config["megabytes"])
        sys.dont_write_bytecode = True
        take_out()
        sys.addaudithook(forbid)
        results.put(b'{"value": "ready"}')
    while True:
        results.put(answer(function, jobs.get()))


if __name__ == "__main__":
    main()
