"""Calls of other people's functions: what they change is put back, and none of them can end or
double the process.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from unmaskrl.tasks import load_function, trl_reward_parts
from unmaskrl.tasks.contained import run_contained

CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "torch's grad mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "torch's default dtype": (
        torch.get_default_dtype,
        lambda: torch.set_default_dtype(torch.float64),
    ),
    "torch's default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "torch's number of threads": (
        torch.get_num_threads,
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    ),
    "torch's deterministic flag": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "torch's anomaly detection": (
        torch.is_anomaly_enabled,
        lambda: torch.set_anomaly_enabled(True),
    ),
    "torch's precision of products": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "torch's cudnn flags": (
        lambda: torch.backends.cudnn.benchmark,
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
    ),
    "the working directory": (os.getcwd, lambda: os.chdir("/")),
    "sys.stdout": (lambda: sys.stdout, lambda: setattr(sys, "stdout", None)),
    "the handler of SIGINT": (
        lambda: signal.getsignal(signal.SIGINT),
        lambda: signal.signal(signal.SIGINT, lambda *_: None),
    ),
    "the alarm clock": (
        lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        lambda: signal.alarm(1000),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_global_settings_are_put_back(name: str) -> None:
    read, change = CHANGES[name]
    before = read()
    assert run_contained(change)[1] == [name] and read() == before

    def change_and_raise() -> None:
        change()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_contained(change_and_raise)
    assert read() == before
    assert run_contained(read) == (before, [])


def draws() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_random_numbers_are_the_functions_own() -> None:
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    def seed() -> None:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)

    run_contained(seed)
    first = run_contained(draws)[0]
    second = run_contained(draws)[0]
    assert first != second, "a function that draws must not draw the same at every step"
    run_contained(seed)
    assert run_contained(lambda: (draws(), draws()))[0] == (first, second)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert all(
        numpy.array_equal(a, b) for a, b in zip(states[1], numpy.random.get_state(), strict=True)
    )


def leave_with_os(**_: Any) -> list[float]:
    os._exit(0)


def leave_with_sys(**_: Any) -> list[float]:
    sys.exit(0)


def become_another(**_: Any) -> list[float]:
    os.execl("/bin/true", "true")


def abort(**_: Any) -> list[float]:
    os.abort()


def cancel(**_: Any) -> list[float]:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (leave_with_sys, "SystemExit: 0"),
        (
            leave_with_os,
            "EndOfProcess: os._exit was called, which would have ended the whole process",
        ),
        (become_another, "EndOfProcess: os.execv was called"),
        (abort, "EndOfProcess: os.abort was called"),
        (cancel, "CancelledError"),
    ],
)
def test_no_reward_ends_the_process(function: Callable[..., list[float]], words: str) -> None:
    with pytest.raises(
        ValueError, match=rf"reward '{function.__name__}' raised .*: {words}"
    ) as info:
        trl_reward_parts([function], ["?"], ["a"], {})
    assert "\n" not in str(info.value)
    assert os._exit.__module__ == "posix"


def test_the_users_interrupt_passes() -> None:
    def interrupted(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trl_reward_parts([interrupted], ["?"], ["a"], {})


@pytest.mark.parametrize("line", ["sys.exit(0)", "os._exit(0)", "raise KeyError('x')"])
def test_a_module_that_ends_when_it_is_imported_is_named(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"ends_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(f"import os, sys\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"task.reward: cannot import '{name}:f'"):
        load_function(f"{name}:f", "task.reward")


SCRIPT = """
import os, sys, multiprocessing
from os import _exit
from unmaskrl.tasks.contained import run_contained

def fork():
    child = os.fork()
    if child:
        os.waitpid(child, 0)

def work():  # a fork that ends itself is the function's own affair
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(abs, [-1])

def close():
    sys.stderr.close()
    os.close(1)

run_contained(fork)
print("once", run_contained(work)[0], flush=True)
print(run_contained(close)[1], flush=True)
print("seen", file=sys.stderr)
_exit(3)
"""


def test_forks_and_closed_streams(tmp_path: Path) -> None:
    """In a process of its own, without torch (forks of threaded processes warn)."""
    package = tmp_path / "unmaskrl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tasks").mkdir()
    (package / "tasks" / "__init__.py").touch()
    source = Path(sys.modules["unmaskrl.tasks"].__path__[0]) / "contained.py"
    (package / "tasks" / "contained.py").symlink_to(source)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = textwrap.dedent(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.splitlines() == ["once [1]", "['file descriptor 1', 'sys.stderr']"]
    assert done.stderr.splitlines() == [
        "unmaskrl: a function that was called forked, and its copy came back: the copy is ended "
        "here",
        "seen",
    ]
    assert done.returncode == 3
