"""What a running command shows: a live display on a terminal, else plain lines.

On a terminal: a bar over the steps with elapsed and left time, a line that says what is done inside
the step, and means over the last 10 steps. Elsewhere: the first and the last step, one step in ten
seconds, and where nothing else was said for a minute the line of the phase.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from .metrics import PHASES, is_part, labelled
from .words import (
    Row,
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

_WINDOW = 10  # steps that shown numbers are averaged over: one step's rollouts are few
_QUIET = 60.0  # seconds without a line, after which a log is told the phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is done inside a step: ``done`` of ``total`` of something. Denoiser calls are counted as
    they are made; ``done`` is None where they are what is counted.
    """

    name: str
    total: int
    done: int | None
    unit: str
    calls: int = 0

    def __str__(self) -> str:
        count = self.calls if self.done is None else self.done
        if not self.total and not count:
            return self.name
        text = f"{self.name} {count}" + (f"/{self.total}" if self.total else "")
        text += f" {self.unit}" if self.unit else ""
        return text if self.done is None or not self.calls else f"{text}, call {self.calls}"


class Progress:
    """Progress of a run: RL (reward, accuracy, denoiser calls, seconds per phase) or supervised
    (losses, learning rate). Without a console it is silent, but for warnings.

    The live display is drawn by a thread of its own, so what it reads is replaced as a whole, never
    changed in place.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.every = every
        self.clock = clock
        self.total = 0
        self.current = 0
        self.rows: tuple[Row, ...] = ()
        self.evals: dict[str, Row] = {}
        self.inside: Phase | None = None
        self.times: tuple[tuple[int, float], ...] = ()
        self.began = clock()
        self.printed: float | None = None  # the last line of a step
        self.spoke = clock()  # the last line
        self.live: _Live | None = None

    def start(self, total_steps: int, title: str) -> None:
        """Begin; ``total_steps`` counts from the run's first step, also if it is resumed."""
        self.stop()
        self.total = total_steps
        self.current = 0
        self.rows = ()
        self.evals = {}
        self.inside = None
        self.times = ()
        self.began = self.clock()
        self.printed = None
        if self.console is None:
            return
        self.note(f"{title}: {total_steps} steps")
        if self.console.is_terminal:
            self.live = _Live(self, self.console)
            self.live.start()

    def phase(self, name: str, total: int = 0, done: int | None = None, unit: str = "") -> None:
        """Say what is done now. With ``done``, that many of ``total``; without, ``call`` counts."""
        self.inside = Phase(name=name, total=total, done=done, unit=unit)
        self._heartbeat()

    def call(self) -> None:
        """A denoiser call was made."""
        if self.inside is not None:
            self.inside = replace(self.inside, calls=self.inside.calls + 1)
            self._heartbeat()

    def step(self, row: Row) -> None:
        """Take a row of a log: of metrics.jsonl, or of a supervised run's (``steps``: its length).
        Of a row with ``note``, that is printed.
        """
        if "note" in row:
            self.note(str(row["note"]))
            return
        now = self.clock()
        self.rows = (*self.rows, row)[-_WINDOW:]
        self.total = int(row.get("steps") or self.total)
        self.current = int(row.get("step", self.current + 1))
        self.times = (*self.times, (self.current, now))[-2 * _WINDOW :]
        self.inside = None
        due = self.printed is None or now - self.printed >= self.every
        if self.live is None and (due or self.current >= self.total):
            self.printed = now
            parts = [f"step {self.current}/{self.total}", *self._line()]
            left = self.seconds_left()
            parts += [f"left {duration(left)}"] if left is not None else []
            self.note(" | ".join(parts))

    def eval(self, row: Row) -> None:
        """Take a row of ``eval.jsonl``; always printed."""
        self.evals = {**self.evals, str(row.get("split", "eval")): row}
        self.inside = None
        self.note(eval_line(row))

    def note(self, text: str) -> None:
        """Print a line; always printed."""
        if self.console is not None:
            self.spoke = self.clock()
            self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line about something that went wrong; on stderr where progress is silent."""
        if self.console is None:
            sys.stderr.write(f"unmaskrl: warning: {text}\n")
        self.note(f"warning: {text}")

    def stop(self) -> None:
        """End the display; may be called twice."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def seconds_left(self) -> float | None:
        """Steps left times the mean time of the recent ones; None before there are two."""
        times = self.times
        if len(times) < 2 or times[-1][0] <= times[0][0]:
            return None
        (first, begin) = times[0]
        (last, end) = times[-1]
        since = self.clock() - end
        return max(0.0, (self.total - last) * (end - begin) / (last - first) - since)

    def details(self) -> Iterable[tuple[str, str]]:
        """Label and text of each line under the bar."""
        if self.inside is not None:
            yield "now", str(self.inside)
        if reward := self._reward():
            yield "reward", reward
        if accuracies := self._accuracies():
            yield "rollout accuracy", accuracies
        if self.evals:
            yield "held-out accuracy", self._held_out()
        if calls := self._calls():
            yield "calls per rollout", calls
        if (live := self._mean("groups/live")) is not None:
            yield "groups with signal", percent(live)
        if phases := self._phases():
            yield "seconds per step", phases
        yield from self._losses()

    def _heartbeat(self) -> None:
        """In a log that was not told anything for long: the phase."""
        if self.live is None and self.console is not None and self.inside is not None:
            now = self.clock()
            if now - self.spoke >= _QUIET:
                elapsed = duration(now - self.began)
                self.note(f"step {self.current}/{self.total} | {self.inside} | elapsed {elapsed}")

    def _mean(self, key: str) -> float | None:
        return mean(number(row, key) for row in self.rows)

    def _phases(self) -> str:
        """Seconds of a step, and how they are spent."""
        known = {}
        for key, name in PHASES.items():
            seconds = [number(row, key) for row in self.rows]
            if any(s is not None for s in seconds):  # a step without the phase spent 0 s in it
                known[name] = sum(s or 0.0 for s in seconds) / len(seconds)
        parts = ", ".join(f"{name} {s:.1f}" for name, s in known.items())
        return f"{sum(known.values()):.1f} ({parts})" if known else ""

    def _accuracies(self) -> str:
        known = {label: self._mean(key) for key, label in labelled("accuracy").items()}
        return "  ".join(f"{label} {percent(v)}" for label, v in known.items() if v is not None)

    def _held_out(self) -> str:
        shown = []
        for split, row in self.evals.items():
            which = f"{row.get('weights', '?')}, step {row.get('step', '?')}"
            shown.append(f"{split} {percent(number(row, 'accuracy'))} ({which})")
        return "  ".join(shown)

    def _calls(self) -> str:
        nfe = self._mean("nfe/mean")
        per_call = self._mean("nfe/tokens_per_call")
        tokens = f" ({per_call:.2f} tokens per call)" if per_call is not None else ""
        return f"{nfe:.1f}{tokens}" if nfe is not None else ""

    def _reward(self) -> str:
        if (total := self._mean("reward/mean")) is None:
            return ""
        keys = [key for key in self.rows[-1] if is_part(key)]
        known = [
            (key.removeprefix("reward/"), v) for key in keys if (v := self._mean(key)) is not None
        ]
        parts = ", ".join(f"{name} {v:.2f}" for name, v in known)
        return f"{total:.3f} ({parts})" if parts else f"{total:.3f}"

    def _losses(self) -> Iterable[tuple[str, str]]:
        """Of a supervised run, whose rows hold no reward: losses as they are, nats per token."""
        row = self.rows[-1] if self.rows else {}
        if "reward/mean" in row:
            return
        for key, value in row.items():
            if (key == "loss" or key.startswith("loss/")) and number(row, key) is not None:
                yield key.replace("/", " "), f"{value:.4f}"
        if (rate := number(row, "lr")) is not None:
            yield "lr", f"{rate:.2e}"

    def _line(self) -> Iterable[str]:
        """The parts of a plain line after the step."""
        reward = self._mean("reward/mean")
        nfe = self._mean("nfe/mean")
        total, _, phases = self._phases().partition(" ")
        yield from [f"reward {reward:.3f}"] if reward is not None else []
        yield from [f"accuracy {self._accuracies()}"] if self._accuracies() else []
        yield from [f"{nfe:.1f} calls/rollout"] if nfe is not None else []
        yield from [f"{total} s/step {phases}"] if phases else []
        yield from [f"held-out {self._held_out()}"] if self.evals else []
        yield from (f"{label} {text}" for label, text in self._losses())


class _Times(ProgressColumn):
    """Elapsed and, once two steps are known, left."""

    def __init__(self, owner: Progress) -> None:
        super().__init__()
        self.owner = owner

    def render(self, task: Task) -> Text:
        left = self.owner.seconds_left()
        rest = f", {duration(left)} left" if left else ""
        return Text(f"{duration(self.owner.clock() - self.owner.began)} elapsed{rest}")


class _Live(Bar):
    """The bar of rich with our lines under it."""

    def __init__(self, owner: Progress, console: Console) -> None:
        self.owner = owner
        super().__init__(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            _Times(owner),
            console=console,
            refresh_per_second=4,
        )
        self.steps = self.add_task("step", total=owner.total)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then a line per detail."""
        if not hasattr(self, "steps"):
            return  # asked for before the bar has its task
        self.tasks[0].total = self.owner.total
        self.tasks[0].completed = self.owner.current
        yield self.make_tasks_table(self.tasks)
        body = Table.grid(padding=(0, 2))
        for label, text in self.owner.details():
            body.add_row(Text(f"  {label}", style="dim"), Text(text))
        yield body


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
