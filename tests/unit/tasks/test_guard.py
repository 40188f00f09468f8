"""The guard: limits of time and memory, restarts, what it refuses, and that nothing is left
behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmaskrl.tasks.sandbox.guard import Guard

EVAL = "builtins:eval"  # the most hostile target there is: the text is the program


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    guard = Guard(EVAL, seconds=1.0, megabytes=200)
    yield guard
    guard.close()


def pid(guard: Guard) -> int:
    return guard.call("__import__('os').getpid()")


def test_values_and_errors_come_back(guard: Guard) -> None:
    assert guard.call("6 * 7") == 42
    assert guard.call("[1.5, None, {'a': True}]") == [1.5, None, {"a": True}]
    errors = guard.errors
    assert guard.call("1 / 0", default="none") == "none"
    assert guard.last_error == "ZeroDivisionError: division by zero"
    with pytest.raises(ValueError, match="NameError: name 'unknown' is not defined"):
        guard.call("unknown")
    assert guard.call("__import__('sys').exit()", default=0.0) == 0.0
    assert guard.call("{1, 2}", default="no JSON") == "no JSON"
    assert guard.errors == errors + 4


@pytest.mark.parametrize(
    "text", ["\x00", "\ud800", "\u202e\u0661", "a\nb\r\n", "\U0001f600", '"\\', "x" * 10**6]
)
def test_texts_of_every_kind_pass_unchanged(text: str) -> None:
    # A target that returns what it is given, so that both directions are tested.
    same = Guard("copy:copy", seconds=5.0)
    assert same.call(text) == text
    same.close()


def test_a_call_that_takes_too_long_is_stopped_and_the_next_one_works(guard: Guard) -> None:
    first = pid(guard)
    timeouts = guard.timeouts
    start = time.monotonic()
    # One C call that holds the interpreter for hours: no signal handler could end it.
    assert guard.call("9**9**9", default=-1.0) == -1.0
    assert 1.0 <= time.monotonic() - start < 60.0  # not hours
    assert guard.timeouts == timeouts + 1 and "took longer than 1 s" in guard.last_error
    assert guard.call("2 + 2") == 4
    assert pid(guard) != first and not alive(first)


def test_each_call_may_have_its_own_limit(guard: Guard) -> None:
    assert guard.call("__import__('time').sleep(1.2)", seconds=10.0) is None
    with pytest.raises(ValueError, match=r"took longer than 0\.1 s"):
        guard.call("__import__('time').sleep(5)", seconds=0.1)


def test_memory_is_bounded(guard: Guard) -> None:
    assert guard.call("len(bytearray(100 * 2**20))") == 100 * 2**20
    assert guard.call("len(bytearray(400 * 2**20))", default="refused") == "refused"
    assert guard.last_error.startswith("MemoryError")
    assert guard.call("2 + 2") == 4


def test_a_crash_gives_the_default_and_a_new_worker(guard: Guard) -> None:
    first = pid(guard)
    crashes = guard.crashes
    assert guard.call("__import__('signal').raise_signal(11)", default="crashed") == "crashed"
    assert guard.crashes == crashes + 1
    # Killed between two calls: this one fails as well, and says so.
    os.kill(pid(guard), signal.SIGKILL)
    time.sleep(0.05)
    assert guard.call("1", default="gone") == "gone"
    assert guard.call("1") == 1 and pid(guard) != first


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "__import__('subprocess').run(['true'])",
        "__import__('socket').socket().connect(('127.0.0.1', 9))",
        "__import__('os').kill(__import__('os').getppid(), 15)",
        "__import__('os').remove('absent')",
        "open('absent', 'w')",
        "__import__('os').open('absent', 1 | 64)",
    ],
)
def test_processes_sockets_signals_and_written_files_are_refused(guard: Guard, text: str) -> None:
    assert guard.call(text, default="refused") == "refused"
    assert guard.last_error.startswith("PermissionError: the guard's worker")


def test_printing_and_reading_do_not_mix_with_the_protocol(guard: Guard) -> None:
    assert guard.call("print('{\"value\": 1}') or __import__('sys').stdin.read()") == ""


def test_it_works_from_other_threads_at_once(guard: Guard) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(guard.call(f"{n} * 10"))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [10 * n for n in range(8)]


def test_sets_have_the_same_order_in_every_worker(guard: Guard) -> None:
    text = "list({str(n) for n in range(50)})"
    first = guard.call(text)
    guard.close()
    assert guard.call(text) == first


def test_a_warm_call_is_cheap(guard: Guard) -> None:
    guard.call("1")
    first = pid(guard)
    start = time.process_time()
    for _ in range(200):
        guard.call("1")
    assert pid(guard) == first, "no call starts a worker"
    assert (time.process_time() - start) / 200 < 0.02


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("absent_module:f", "did not start: ModuleNotFoundError: No module named 'absent_module'"),
        ("math:absent", "did not start: AttributeError"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_always_an_error(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        Guard(target).call(1, default=0.0)
    assert "\n" not in str(info.value)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'module:function'"):
        Guard("math.sqrt")
    with pytest.raises(ValueError, match="expected positive limits"):
        Guard("math:sqrt", seconds=0)


def test_our_own_targets_load_without_torch() -> None:
    own = Guard("unmaskrl.tasks.base:nearest", seconds=5.0)
    assert own.call("countdwn", ["countdown", "sudoku"]) == "did you mean 'countdown'?"
    maps = Path(f"/proc/{own._process.pid}/maps").read_text() if sys.platform == "linux" else ""
    assert "libtorch" not in maps
    own.close()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_worker_outlives_its_process() -> None:
    """Neither after a normal end nor after SIGKILL, and a forked copy does not end the parent's
    worker.
    """
    code = (
        "import os, signal, sys\n"
        "from unmaskrl.tasks.sandbox.guard import Guard\n"
        "guard = Guard('builtins:eval')\n"
        "own = guard.call(\"__import__('os').getpid()\")\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    other = guard.call(\"__import__('os').getpid()\")\n"
        "    sys.exit(other == own)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert guard.call(\"__import__('os').getpid()\") == own\n"
        "print(own, flush=True)\n"
        "if sys.argv[1] == 'kill':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    source = Path(sys.modules["unmaskrl.tasks"].__path__[0]).parents[1]
    for how in ("end", "kill"):
        environment = {**os.environ, "PYTHONPATH": str(source)}
        done = subprocess.run(
            [sys.executable, "-c", code, how],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == (0 if how == "end" else -signal.SIGKILL), done.stderr
        worker = int(done.stdout)
        deadline = time.monotonic() + 60.0
        while alive(worker) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(worker)


# Texts of a hostile completion, run by the most hostile scorer. Each tries to leave a mark
# ({mark}), to change the file {kept}, or to have a later call answered with what it wrote. An
# expression that runs statements is exec'd.
FORGED = r"""b'{"value": 0.999}\n' * 9"""
ATTACKS = {
    "truncate by a flag": "import os; os.open('{kept}', os.O_RDONLY | os.O_TRUNC)",
    "create by a flag": "import os; os.open('{mark}', os.O_RDONLY | os.O_CREAT)",
    "create by a mode": "open('{mark}', 'x')",
    "truncate by name": "import os; os.truncate('{kept}', 0)",
    "a fifo": "import os; os.mkfifo('{mark}')",
    "a device": "import os; os.mknod('{mark}')",
    "a link": "import os; os.symlink('{kept}', '{mark}')",
    "a name that was imported": "import shutil, os; shutil.os.mkfifo('{mark}')",
    "fork_exec": "import _posixsubprocess as p, os; r, w = os.pipe(); p.fork_exec([b'sh', b'-c', "
    "b'echo > {mark}'], "
    "[b'/bin/sh'], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w, True, False, -1, None, "
    "None, None, -1, None, True)",
    "subprocess's fork_exec": "import subprocess as s; s._fork_exec([b'touch', b'{mark}'], "
    "[b'/bin/touch'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/touch', ['touch', '{mark}'], {{}})",
    "spawnv": "import os; os.spawnv(os.P_WAIT, '/bin/touch', ['touch', '{mark}'])",
    "fork": "import os; os.fork() or open('{mark}', 'w')",
    "forkpty": "import os; os.forkpty()[0] or open('{mark}', 'w')",
    "exec": "import os; os.execv('/bin/touch', ['touch', '{mark}'])",
    "popen": "import os; os.popen('touch {mark}').read()",
    "a database": "import sqlite3; sqlite3.connect('{mark}').execute('create table a (b)')",
    "the same module again": "import sys; del sys.modules['posix']; import posix; "
    "posix.mkfifo('{mark}')",
    "a module made anew": "import _imp, importlib.util as u; m = "
    "_imp.create_builtin(u.find_spec('posix')); m.mkfifo('{mark}')",
    "reload": "import importlib, posix; importlib.reload(posix).mkfifo('{mark}')",
    "another interpreter": "import _xxsubinterpreters as x; i = x.create(); x.run_string(i, "
    "'open(\\'{mark}\\', \\'w\\')')",
    "C": "import ctypes; ctypes.CDLL(None).system(b'touch {mark}')",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory as S; S('{name}', "
    "True, 10)",
    "a semaphore": "import _multiprocessing as m; m.SemLock(0, 1, 1, '{name}', False)",
    "a signal to the parent": "import os, signal; "
    "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 15)",
    "a higher limit": "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (9, 9))",
    "a socket": "import socket; socket.socketpair()",
}
# They go on after an error: the channel is not the first file that they try.
FORGERIES = {
    "os.write": "import os; os.write({n}, {forged})",
    "writev": "import os; os.writev({n}, [{forged}])",
    "open": "open({n}, 'wb', buffering=0, closefd=False).write({forged})",
    "FileIO": "import io; io.FileIO({n}, 'w', closefd=False).write({forged})",
    "by /proc": "open('/proc/self/fd/{n}', 'wb', buffering=0).write({forged})",
    "all objects": "import gc; [o for o in gc.get_objects() if hasattr(o, "
    "'fileno')][{n}].write({forged})",
    "other threads": "import sys; list(sys._current_frames().values())[{n} - "
    "3].f_locals['replies'].write({forged})",
    "callers": "import sys; f = sys._getframe({n}); (f.f_locals.get('replies') or "
    "f.f_locals['channel']).write({forged})",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_text_may_not_do(guard: Guard, name: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    mark = tmp_path / "mark"
    kept.write_text("thesis")
    names = {"kept": kept, "mark": mark, "name": f"unmaskrl-{os.getpid()}"}
    code = ATTACKS[name].format(**names)
    assert guard.call(f"exec({code!r})", default="stopped") == "stopped"
    assert guard.last_error.startswith("PermissionError: the guard's worker"), guard.last_error
    assert kept.read_text() == "thesis" and [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not Path(f"/dev/shm/{names['name']}").exists()
    assert [guard.call(f"{n} * 7") for n in range(5)] == [0, 7, 14, 21, 28]


@pytest.mark.parametrize("name", FORGERIES)
def test_no_text_answers_for_another_call(guard: Guard, name: str) -> None:
    for number in range(12):
        code = FORGERIES[name].format(n=number, forged=FORGED)
        guard.call(f"exec({code!r})", default="stopped")
        assert [guard.call(f"{n} * 7", default="none") for n in range(3)] == [0, 7, 14]


FRAMES = """
import sys
seen, frame = [], sys._getframe()
while frame:
    seen += [type(value).__name__ for value in frame.f_locals.values()]
    frame = frame.f_back
result = [name for name in seen if name in ('FileIO', 'BufferedReader', 'BufferedWriter')]
"""


def test_the_channel_and_the_number_of_a_call_are_not_in_sight(guard: Guard) -> None:
    assert guard.call(f"(scope := {{}}, exec({FRAMES!r}, scope))[0]['result']") == []


def test_a_reply_with_another_number_is_no_reply() -> None:
    """Should text reach the channel all the same: here by a target that is handed it."""
    own = Guard("tests.forging_target:answer", seconds=5.0)
    assert own.call(False) == "mine"
    crashes = own.crashes
    assert own.call(True, default="none") == "none" and own.crashes == crashes + 1
    assert own.last_error == "tests.forging_target:answer wrote to the worker's reply channel"
    assert [own.call(False) for _ in range(3)] == ["mine"] * 3
    own.close()
