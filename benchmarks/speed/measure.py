"""Measuring: the phases of sides that run in turn, ratios with their spread, peak bytes of tensors,
peak memory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Seconds = tuple[float, float]  # CPU, wall


class Laps:
    """CPU and wall seconds of the phases of one run: call it with a phase's name when the phase
    ends.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = {}
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def __call__(self, phase: str) -> None:
        cpu = time.process_time()
        wall = time.perf_counter()
        self.seconds[phase] = (cpu - self._cpu, wall - self._wall)
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def of(self, phase: str) -> Seconds:
        """The seconds of a phase, or of all phases together if none has that name."""
        if phase in self.seconds:
            return self.seconds[phase]
        cpu, wall = zip(*self.seconds.values(), strict=True)
        return sum(cpu), sum(wall)


def take_turns(
    sides: Mapping[str, Callable[[Laps], Any]], repeats: int
) -> tuple[dict[str, list[Laps]], list[Any]]:
    """Run the sides A/B/A/B, ``repeats`` times each; the laps of every run by side, and what the
    last runs returned.
    """
    times: dict[str, list[Laps]] = {name: [] for name in sides}
    results: list[Any] = []
    for _ in range(repeats):
        results = []
        for name, side in sides.items():
            laps = Laps()
            results.append(side(laps))
            times[name].append(laps)
    return times, results


def ratio(theirs: list[Seconds], ours: list[Seconds]) -> dict[str, Any]:
    """min(theirs) / min(ours) of CPU and wall time, each with its spread, and the verdict on CPU
    time.

    Spread: how far the median run is above the best one, on the side where that is more (a share; 0
    if there is one run).
    """
    row: dict[str, Any] = {}
    for i, clock in enumerate(("cpu", "wall")):
        sides = [[seconds[i] for seconds in side] for side in (theirs, ours)]
        row[f"ratio_{clock}"] = min(sides[0]) / min(sides[1])
        row[f"spread_{clock}"] = max(median(side) / min(side) for side in sides) - 1
        row[f"seconds_{clock}"] = [min(side) for side in sides]
    single = min(len(theirs), len(ours)) == 1
    return row | {"verdict": "one run" if single else verdict(row["ratio_cpu"], row["spread_cpu"])}


def verdict(value: float, spread: float) -> str:
    """``no difference`` from 1 / (1 + spread) to 1 + spread, else ``faster`` or ``slower``."""
    if 1 / (1 + spread) <= value <= 1 + spread:
        return "no difference"
    return "faster" if value > 1 else "slower"


class PeakBytes(TorchDispatchMode):
    """Largest sum of bytes alive at once among tensors made inside whose last size is ``width``.

    A storage counts once, views of older storages not at all. ``peak`` is the result, in bytes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            wide = isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.shape[-1] == self.width
            if wide and tensor.untyped_storage()._cdata not in old:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def resident_growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of this process peaks above its start during ``work``;
    None if not on Linux.

    Meaningful in a fresh process only: memory that was freed before can be used again unseen.
    """
    status = Path("/proc/self/status")
    reset = Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None
    reset.write_text("5")  # peak := now
    start = _status_bytes(status, "VmRSS")
    work()
    return _status_bytes(status, "VmHWM") - start


def _status_bytes(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def reuse_pages() -> bool:
    """Tell glibc to keep freed memory in the process, for good; False where that is not
    possible.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold = -1  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    mmap_max = -4
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }
