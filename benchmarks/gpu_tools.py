"""What ``benchmarks.gpu`` measures with: sizes, clocks, random models, counters, the table."""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.types import Canvas
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import known_config, parse_config
from unmaskrl.recipes.memory import GIB
from unmaskrl.recipes.shape import ModelShape

MODELS = {"LLaDA-8B": "GSAI-ML/LLaDA-8B-Instruct", "Dream-7B": "Dream-org/Dream-v0-Instruct-7B"}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured, and on how many rows."""

    layers: int | None  # None: all; 0: a tiny model
    batches: tuple[int, ...] = (1, 6, 24, 96)
    length: int = 456  # tokens of a canvas
    block: int = 32
    rank: int = 128
    square: int = 8192  # of the matrix product
    copied: int = 2**30  # bytes
    repeat: int = 3


SIZES = {
    "real": Size(layers=None),
    "small": Size(layers=4, batches=(1, 6, 24)),
    "cpu": Size(
        layers=0,
        batches=(2,),
        length=24,
        block=8,
        rank=2,
        square=64,
        copied=2**16,
        repeat=1,
    ),
}


@dataclass
class Bench:
    """One run: the device, its measured rate, and the rows of the table so far."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    rate: float = 1.0  # FLOP/s
    rows: list[Row] = field(default_factory=list)
    # a call of the published loop, by rows and setting
    published: dict[tuple[int, str], float | None] = field(default_factory=dict)

    def seconds(
        self, work: Callable[[], object], repeat: int | None = None, *, warm: bool = False
    ) -> float:
        """Of the fastest run, after one that does not count unless all is ``warm``."""
        if not warm:
            work()
        found = []
        for _ in range(repeat or self.size.repeat):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begin)
        return min(found)

    def attempt(self, work: Callable[[], object]) -> float | None:
        """Seconds of one run; None if it needs more memory than there is."""
        try:
            return self.seconds(work, 1)
        except torch.OutOfMemoryError:
            return None

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(
        self, section: str, what: str, seconds: float | None, flops: float = 0.0, **more: Any
    ) -> None:
        """A row, and a line for whoever waits. ``seconds`` None: it did not fit into memory."""
        row: Row = {"section": section, "what": what, "ms": seconds and 1e3 * seconds}
        if flops and seconds:
            row["share"] = flops / seconds / self.rate
        self.rows.append(row | more)
        sys.stderr.write(f"{section}: {what}: {number(row['ms'])} ms\n")

    @contextmanager
    def peak(self, found: Row) -> Iterator[None]:
        """Puts the GiB that were allocated at once beyond those before into ``found``."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        found["peak_gib"] = (torch.cuda.max_memory_allocated(self.device) - before) / GIB

    def generator(self) -> torch.Generator:
        """A fresh one on the device."""
        return torch.Generator(self.device).manual_seed(0)


@dataclass(frozen=True)
class Subject:
    """A random model and what a pass of it needs."""

    name: str
    denoiser: ModelDenoiser
    shape: ModelShape

    @classmethod
    def of(cls, bench: Bench, name: str) -> Subject:
        """Built on the device."""
        raw = known_config(MODELS[name])
        assert raw is not None
        read, family = parse_config(raw, name)
        config: Any = read
        if bench.size.layers == 0:
            config = config.tiny().with_vocabulary(400, 399, 398, 398)
        elif bench.size.layers:
            fewer = {config.key("n_layers"): bench.size.layers}
            config = type(config).from_dict(config.to_dict() | fewer)
        module = family.build(config).to(bench.dtype).init_weights(bench.generator()).eval()
        module.requires_grad_(False)
        return cls(name, ModelDenoiser.from_model(module), ModelShape.of(config, family))

    def flops(self, rows: int, length: int, scored: float) -> float:
        """Of one forward pass: products of the body, attention, and the head at ``scored`` rows."""
        s = self.shape
        attention = 4 * s.n_layers * s.heads * length
        return rows * length * (2 * s.in_linears + attention) + 2 * s.d_model * s.vocab * scored

    def canvas(self, bench: Bench, rows: int) -> Canvas:
        """Random prompts, and one open block."""
        size = (rows, bench.size.length - bench.size.block)
        prompts = torch.randint(256, size, generator=torch.Generator().manual_seed(1)).tolist()
        return blank_canvas(
            prompts, gen_length=bench.size.block, denoiser=self.denoiser, device=bench.device
        )


class WideFloats(TorchDispatchMode):
    """Counts operators that make a float32 tensor of ``least`` elements or more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.count += any(t.dtype == torch.float32 and t.numel() >= self.least for t in made)
        return result


@contextmanager
def synchronisations(bench: Bench) -> Iterator[list[Any]]:
    """A warning per operator that waits for the GPU."""
    if bench.device.type != "cuda":
        yield []
        return
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def machine_of(bench: Bench) -> dict[str, Any]:
    """Which card, with what, and when."""
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if cuda else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "dtype": str(bench.dtype),
        "layers": bench.size.layers,
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of a page."""
    m = result["machine"]
    lines = [
        f"{m['device']}, torch {m['torch']}, {m['dtype']}, {m['date']}.",
        "",
        "| section | what | ms | share | ratio | more |",
        "|---|---|---|---|---|---|",
    ]
    shown = ("section", "what", "ms", "share", "ratio")
    for row in result["rows"]:
        rest = ", ".join(f"{k} {number(v)}" for k, v in row.items() if k not in shown)
        cells = [row["section"], row["what"], *(number(row.get(key)) for key in shown[2:])]
        lines.append("| " + " | ".join([*cells, rest]) + " |")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Three digits; - where nothing was measured."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
