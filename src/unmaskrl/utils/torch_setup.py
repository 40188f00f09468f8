"""Threads, devices and types of numbers: what torch is told before any work."""

from __future__ import annotations

import os
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def set_threads(wanted: int) -> int:
    """Use ``wanted`` CPU threads; 0 times one thread against all cores and keeps the faster.

    A second thread on a busy 2-core machine can be ten times slower than one, so the choice is
    measured, not guessed.
    """
    if wanted < 0:
        raise ValueError(
            f"threads is {wanted}; expected a number of CPU threads, or 0 to measure which is "
            "fastest"
        )
    if wanted == 0:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        candidates = sorted({1, min(cores, 8)})
        wanted = min(candidates, key=_probe_seconds)
    torch.set_num_threads(wanted)
    return wanted


def _probe_seconds(threads: int) -> float:
    """Median seconds of a small matrix chain, the shape of work of a small model; a tie goes to
    fewer threads.
    """
    torch.set_num_threads(threads)
    x = torch.ones(4096, 128)
    w = torch.full((128, 384), 1e-3)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(8):
            torch.matmul(torch.nn.functional.silu(x @ w), w.T)
        times.append(time.perf_counter() - start)
    # a slow quantile: one stalled call stalls a step
    return sorted(times)[6] * (1.0 if threads == 1 else 1.1)


def pick_device(name: str | torch.device) -> torch.device:
    """A device by its name; ``auto`` is a GPU if there is one. ValueError if it is not here."""
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or mps, got {name!r}") from None
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "meta": True,
    }
    if not here.get(device.type):
        raise ValueError(f"device: this torch ({torch.__version__}) sees no {device.type}; use cpu")
    return device


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def installed(*packages: str) -> dict[str, str]:
    """Versions by name; "unknown" where a package has no metadata, as when this one runs from a
    source folder.
    """
    found = {}
    for name in packages:
        try:
            found[name] = __version__ if name == "unmaskrl" else version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
