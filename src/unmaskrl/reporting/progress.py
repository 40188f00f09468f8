"""What a running command shows: a live display on a terminal, else a plain line every ten seconds
(shell).

``TrainProgress``, ``SFTProgress`` and ``SilentProgress`` have the same methods: start, step, eval,
note, warn, stop. The live display is drawn by a thread of its own, so what it reads is replaced as
a whole, never changed in place.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..utils.terminal import PlainConsole
from .metrics import PHASES, is_part, labelled
from .words import (
    decimal,
    duration,
    eval_line,
    interval,
    mean,
    number,
    percent,
    preferred,
    verdict,
)

Row = dict[str, Any]
_WINDOW = 10  # steps that shown numbers are averaged over: one step's rollouts are few


class TrainProgress:
    """RL: reward, accuracy, denoiser calls, seconds per phase, time left; means over the last 10
    steps.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.display = _Display(console or PlainConsole(), every, clock)
        self.rows: tuple[Row, ...] = ()
        self.evals: dict[str, Row] = {}

    def start(self, total_steps: int, title: str) -> None:
        """Begin; ``total_steps`` counts from the run's first step, also if it is resumed."""
        self.rows = ()
        self.evals = {}
        self.display.start(total_steps, title, self._details)

    def step(self, row: Row) -> None:
        """Take a row of ``metrics.jsonl``."""
        self.rows = (*self.rows, row)[-_WINDOW:]
        self.display.step(row, self._line)

    def eval(self, row: Row) -> None:
        """Take a row of ``eval.jsonl``; always printed."""
        self.evals = {**self.evals, str(row.get("split", "eval")): row}
        self.display.note(eval_line(row))

    def note(self, text: str) -> None:
        """Print a line; always printed."""
        self.display.note(text)

    def warn(self, text: str) -> None:
        """Print a line about something that went wrong."""
        self.display.note(f"warning: {text}")

    def stop(self) -> None:
        """End the display; may be called twice."""
        self.display.stop()

    def _mean(self, key: str) -> float | None:
        return mean(number(row, key) for row in self.rows)

    def _phases(self) -> tuple[float, str]:
        """Seconds of a step, and how they are spent."""
        known = {}
        for key, name in PHASES.items():
            seconds = [number(row, key) for row in self.rows]
            if any(s is not None for s in seconds):  # a step without the phase spent 0 s in it
                known[name] = sum(s or 0.0 for s in seconds) / len(seconds)
        return sum(known.values(), 0.0), ", ".join(f"{name} {s:.1f}" for name, s in known.items())

    def _accuracies(self) -> str:
        known = {label: self._mean(key) for key, label in labelled("accuracy").items()}
        return "  ".join(f"{label} {percent(v)}" for label, v in known.items() if v is not None)

    def _held_out(self) -> str:
        shown = []
        for split, row in self.evals.items():
            which = f"{row.get('weights', '?')}, step {row.get('step', '?')}"
            shown.append(f"{split} {percent(number(row, 'accuracy'))} ({which})")
        return "  ".join(shown)

    def _details(self) -> Iterable[tuple[str, str]]:
        """Label and text of each line under the bar."""
        nfe, per_call, live = (
            self._mean(k) for k in ("nfe/mean", "nfe/tokens_per_call", "groups/live")
        )
        if reward := self._reward():
            yield "reward", reward
        if accuracies := self._accuracies():
            yield "rollout accuracy", accuracies
        if self.evals:
            yield "held-out accuracy", self._held_out()
        if nfe is not None:
            tokens = f" ({per_call:.2f} tokens per call)" if per_call is not None else ""
            yield "calls per rollout", f"{nfe:.1f}{tokens}"
        if live is not None:
            yield "groups with signal", percent(live)
        seconds, phases = self._phases()
        if phases:
            yield "seconds per step", f"{seconds:.1f} ({phases})"

    def _reward(self) -> str:
        if (total := self._mean("reward/mean")) is None:
            return ""
        keys = [key for key in self.rows[-1] if is_part(key)]
        known = [
            (key.removeprefix("reward/"), v) for key in keys if (v := self._mean(key)) is not None
        ]
        parts = ", ".join(f"{name} {v:.2f}" for name, v in known)
        return f"{total:.3f} ({parts})" if parts else f"{total:.3f}"

    def _line(self) -> str:
        """The plain line's text after the step."""
        reward = self._mean("reward/mean")
        nfe = self._mean("nfe/mean")
        seconds, phases = self._phases()
        parts = [
            f"reward {reward:.3f}" if reward is not None else "",
            f"accuracy {self._accuracies()}" if self._accuracies() else "",
            f"{nfe:.1f} calls/rollout" if nfe is not None else "",
            f"{seconds:.1f} s/step ({phases})" if phases else "",
            f"held-out {self._held_out()}" if self.evals else "",
        ]
        return " | ".join(part for part in parts if part)


class SFTProgress:
    """Supervised training: loss (nats per token), learning rate, time left."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.display = _Display(console or PlainConsole(), every, clock)
        self.row: Row = {}

    def start(self, total_steps: int, title: str) -> None:
        """Begin."""
        self.row = {}
        self.display.start(total_steps, title, self._details)

    def step(self, row: Row) -> None:
        """Take a row with step, steps, loss, lr; of a row with ``note``, that is printed."""
        if "note" in row:
            self.note(str(row["note"]))
            return
        self.row = row
        self.display.total = int(row.get("steps") or self.display.total)
        self.display.step(
            row, lambda: " | ".join(f"{label} {text}" for label, text in self._details())
        )

    def eval(self, row: Row) -> None:
        """Take an evaluation's summary; always printed."""
        self.display.note(eval_line(row))

    def note(self, text: str) -> None:
        """Print a line; always printed."""
        self.display.note(text)

    def warn(self, text: str) -> None:
        """Print a line about something that went wrong."""
        self.display.note(f"warning: {text}")

    def stop(self) -> None:
        """End the display; may be called twice."""
        self.display.stop()

    def _details(self) -> Iterable[tuple[str, str]]:
        for key, value in self.row.items():
            if (key == "loss" or key.startswith("loss/")) and number(self.row, key) is not None:
                yield key.replace("/", " "), f"{value:.4f}"
        if (rate := number(self.row, "lr")) is not None:
            yield "lr", f"{rate:.2e}"


class SilentProgress:
    """Shows nothing: for tests, and for all ranks but the first."""

    def start(self, total_steps: int, title: str) -> None:
        """Nothing."""

    def step(self, row: Row) -> None:
        """Nothing."""

    def eval(self, row: Row) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """A line on stderr: silence is for progress, not for what went wrong."""
        sys.stderr.write(f"unmaskrl: warning: {text}\n")

    def stop(self) -> None:
        """Nothing."""


class _Display:
    """A bar with lines under it on a terminal; elsewhere the first and last step and one line every
    few seconds.
    """

    def __init__(self, console: Console, every: float, clock: Callable[[], float]) -> None:
        self.console = console
        self.every = every
        self.clock = clock
        self.title = ""
        self.total = 0
        self.current = 0
        self.details: Callable[[], Iterable[tuple[str, str]]] = lambda: ()
        self.times: tuple[tuple[int, float], ...] = ()
        self.printed: float | None = None
        self.live: Live | None = None

    def start(
        self, total: int, title: str, details: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        self.stop()
        self.title = title
        self.total = total
        self.current = 0
        self.details = details
        self.times = ()
        self.printed = None
        if self.console.is_terminal:
            self.live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
            self.live.start()
        else:
            self.note(f"{title}: {total} steps")

    def step(self, row: Row, line: Callable[[], str]) -> None:
        self.current, now = int(row.get("step", self.current + 1)), self.clock()
        self.times = (*self.times, (self.current, now))[-2 * _WINDOW :]
        if self.live:
            return
        due = self.printed is None or now - self.printed >= self.every
        if due or self.current >= self.total:
            self.printed = now
            left = self.seconds_left()
            tail = f" | left {duration(left)}" if left is not None else ""
            self.note(f"step {self.current}/{self.total} | {line()}{tail}")

    def seconds_left(self) -> float | None:
        """Steps left times the mean time of the recent ones; None before there are two."""
        times = self.times
        if len(times) < 2 or times[-1][0] <= times[0][0]:
            return None
        (first, begin) = times[0]
        (last, end) = times[-1]
        since = self.clock() - end
        return max(0.0, (self.total - last) * (end - begin) / (last - first) - since)

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def render(self) -> RenderableType:
        left = self.seconds_left()
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, self.total), completed=self.current, width=28)
        counter = f"step {self.current}/{self.total}"
        time_left = f"{duration(left)} left" if left else ""
        head.add_row(Text(self.title, style="bold"), bar, Text(counter), Text(time_left))
        body = Table.grid(padding=(0, 2))
        for label, text in self.details():
            body.add_row(Text(f"  {label}", style="dim"), Text(text))
        return Group(head, body)


def summary_table(
    before: Row | None, after: dict[str, Row], minutes: float, report: Path | str
) -> RenderableType:
    """The closing table: eval rows before and after (by weights), verdict, wall time, the report's
    place.
    """
    before = before or {}  # eval.jsonl lost its first line
    table = Table(
        title=f"Held-out accuracy on {before.get('num_problems', '?')} problems",
        title_justify="left",
    )
    table.add_column("weights")
    for name in ("accuracy", "95% interval", "calls per problem", "tokens per call"):
        table.add_column(name, justify="right")
    for name, row in {"before": before, **{f"after ({k})": v for k, v in after.items()}}.items():
        table.add_row(
            name,
            percent(number(row, "accuracy")),
            interval(row),
            decimal(number(row, "nfe"), 1),
            decimal(number(row, "tokens_per_call"), 2),
        )
    lines = (
        verdict(before, preferred(after)),
        f"Wall time {duration(60 * minutes)}",
        f"Report {report}",
    )
    return Group(table, *map(Text, lines))
