"""Run somebody else's function so that it can bend, end or double nothing but its own call.
Standard library only.

torch and numpy are looked up among the loaded modules and never imported: what is not loaded holds
no state to protect.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Setting = tuple[Callable[[], Any], Callable[[Any], Any]]

_ENDS = ("_exit", "abort", "execv", "execve")  # os.execl and its siblings go through the last two
_REAL = {name: getattr(os, name) for name in _ENDS}
# processes with a call in progress: a forked copy has another id, and may end itself
_CALLERS: list[int] = []
_STREAMS: dict[str, Any] = {}  # where the functions' own random numbers stand


class EndOfProcess(BaseException):
    """A contained function asked for the end of the process."""


def run_contained(call: Callable[[], T]) -> tuple[T, list[str]]:
    """(call(), names of the global settings that it changed); they are put back, whether it returns
    or raises.

    Put back: working directory, standard streams, handlers of SIGINT and SIGTERM, a running alarm,
    and torch's grad mode, default dtype and device, threads, deterministic flags and precision. The
    global generators of random, numpy and torch are the functions' own during the call: they go on
    where the last call left them, the caller's do not move. os._exit, os.abort and os.exec* raise
    EndOfProcess. A forked copy that comes back out of the call is ended there. Not covered: a
    signal to the own process, what C code does, threads that outlive the call, environment
    variables.
    """
    owner = os.getpid()
    settings = _settings()
    before = {name: read() for name, (read, _) in settings.items()}
    generators = _generators()
    outer = {name: read() for name, (read, _) in generators.items()}
    for name, (_, write) in generators.items():
        if name in _STREAMS:
            write(_STREAMS[name])
    changed: list[str] = []
    with _descriptors_kept(changed), _ends_refused():
        try:
            result = call()
        finally:
            if os.getpid() != owner:
                _end_copy()
            for name, (read, write) in generators.items():
                _STREAMS[name] = read()
                write(outer[name])
            changed += [
                name
                for name, (read, write) in settings.items()
                if _put_back(read, write, before[name])
            ]
    return result, changed


def _put_back(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> bool:
    """Whether a setting had to be written."""
    if read() == value:
        return False
    write(value)
    return True


def _settings() -> dict[str, Setting]:
    """What is put back, by the name that a reader knows it by."""
    settings: dict[str, Setting] = {
        "the working directory": (_folder, lambda path: path and os.chdir(path)),
        "sys.stdout": (lambda: sys.stdout, lambda stream: setattr(sys, "stdout", stream)),
        "sys.stderr": (lambda: sys.stderr, lambda stream: setattr(sys, "stderr", stream)),
    }
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            settings[f"the handler of {number.name}"] = _handler(number)
        if hasattr(signal, "setitimer"):
            settings["the alarm clock"] = (
                lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0,
                lambda _: signal.setitimer(signal.ITIMER_REAL, 0),
            )
    return settings | _torch_settings(sys.modules.get("torch"))


def _handler(number: signal.Signals) -> Setting:
    # None: installed by C code, which Python cannot put back.
    return lambda: signal.getsignal(
        number
    ), lambda handler: handler is not None and signal.signal(number, handler)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _torch_settings(torch: Any) -> dict[str, Setting]:
    if not hasattr(torch, "set_default_dtype"):  # absent, or still being imported
        return {}

    def deterministic() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def cudnn() -> tuple[bool, bool, bool]:
        flags = torch.backends.cudnn
        return flags.enabled, flags.benchmark, flags.deterministic

    def set_cudnn(values: tuple[bool, bool, bool]) -> None:
        flags = torch.backends.cudnn
        flags.enabled, flags.benchmark, flags.deterministic = values

    return {
        "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        # without a default device tensors are made on the CPU
        "torch's default device": (
            torch.get_default_device,
            lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        ),
        "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
        "torch's deterministic flag": (
            deterministic,
            lambda v: torch.use_deterministic_algorithms(v[0], warn_only=v[1]),
        ),
        "torch's anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        "torch's precision of products": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        "torch's cudnn flags": (cudnn, set_cudnn),
    }


def _generators() -> dict[str, Setting]:
    """The global random generators that are there."""
    found: dict[str, Setting] = {"random": (random.getstate, random.setstate)}
    numpy: Any = sys.modules.get("numpy.random")
    torch: Any = sys.modules.get("torch")
    if hasattr(numpy, "set_state"):
        found["numpy"] = (numpy.get_state, numpy.set_state)
    if hasattr(torch, "set_rng_state"):
        found["torch"] = (torch.get_rng_state, torch.set_rng_state)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["cuda"] = (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    return found


@contextlib.contextmanager
def _ends_refused() -> Iterator[None]:
    """os._exit and its kind raise in this process while a call is in progress."""
    _CALLERS.append(os.getpid())
    previous = {name: getattr(os, name) for name in _ENDS}
    for name in _ENDS:
        setattr(os, name, _REFUSING[name])
    try:
        yield
    finally:
        _CALLERS.pop()
        for name, function in previous.items():
            setattr(os, name, function)


def _refusing(name: str) -> Callable[..., Any]:
    # A module that was imported during a call may keep this function: outside of calls it does what
    # it is named after.
    def end(*args: Any) -> Any:
        if os.getpid() in _CALLERS:
            raise EndOfProcess(f"os.{name} was called, which would have ended the whole process")
        return _REAL[name](*args)

    return end


_REFUSING = {name: _refusing(name) for name in _ENDS}


@contextlib.contextmanager
def _descriptors_kept(changed: list[str]) -> Iterator[None]:
    """Standard output and error go where they went, although the function may close them or turn
    them elsewhere.
    """
    kept = {number: _duplicate(number) for number in (1, 2)}
    streams = {1: sys.stdout, 2: sys.stderr}
    try:
        yield
    finally:
        for number, copy in kept.items():
            if copy is None:
                continue
            if _file(number) != _file(copy):
                os.dup2(copy, number)
                changed.append(f"file descriptor {number}")
            os.close(copy)
            if getattr(streams[number], "closed", False):
                name = {1: "stdout", 2: "stderr"}[number]
                how: dict[str, Any] = {"encoding": "utf-8", "buffering": 1, "closefd": False}
                stream = open(number, "w", **how)  # noqa: SIM115
                setattr(sys, name, stream)
                changed.append(f"sys.{name}")


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed before we came
        return None


def _file(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _end_copy() -> None:
    with contextlib.suppress(OSError):
        os.write(
            2,
            b"unmaskrl: a function that was called forked, and its copy came back: the copy is "
            b"ended here\n",
        )
    _REAL["_exit"](1)
