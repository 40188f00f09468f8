"""SIGINT and SIGTERM: a run ends where a checkpoint is exact, and every command says how to
go on.

The first signal only sets a flag. A run looks at it between updates, and between two denoiser calls
of work that may be dropped: rollouts, scoring and evaluations depend on (weights, seed, step)
alone, so a resumed run does them again alike. An exception out of the handler could hit a
half-copied tensor instead. Ranks agree before any of them stops.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher hands on a Ctrl-C that its ranks got from the terminal too: soon after the first it is
# the same one.
_SAME_SIGNAL = 2.0  # seconds
_SHOW_CURSOR = b"\x1b[?25h"
_end_process = os._exit  # itself: while a reward runs, os._exit is an error of that reward


class Stopped(KeyboardInterrupt):
    """A signal ended the command; ``place`` says where, ``resumable`` whether --resume goes on from
    there.
    """

    def __init__(self, signum: int, place: str = "interrupted", *, resumable: bool = False) -> None:
        super().__init__(place)
        self.signum = signum
        self.place = place
        self.resumable = resumable

    @property
    def code(self) -> int:
        """The exit code that a shell gives a process which this signal killed: 130 or 143."""
        return 128 + self.signum


class Abandoned(BaseException):
    """Raised between two denoiser calls of work that may be dropped."""


class Lost(ConnectionError):
    """What a run works with beside itself is gone, such as a server that decodes its rollouts: the
    run is saved, and ends with this line.
    """


class Stop:
    """Whether a signal asked the run to stop."""

    def __init__(self) -> None:
        self.signum = 0
        self.asked = 0.0
        self._droppable = False

    def check(self) -> None:
        """Leave work that may be dropped, if a signal came."""
        if self.signum and self._droppable:
            raise Abandoned

    def obey(self, most: Callable[[float], float]) -> None:
        """Stop if any rank was asked to (``most``: the maximum over ranks, so all call): all stop
        here, or none.
        """
        signum = int(most(float(self.signum)))
        if signum:
            raise Stopped(signum)

    @contextmanager
    def droppable(self, most: Callable[[float], float]) -> Iterator[None]:
        """Work that leaves no trace until it is done; a rank that leaves it early meets the others
        at its end. Lost by one of them is Lost by all.
        """
        self._droppable = True
        lost: Lost | None = None
        try:
            yield
        except Abandoned:
            pass
        except Lost as error:
            lost = error
        finally:
            self._droppable = False
        self.obey(most)
        if most(float(lost is not None)):
            raise lost or Lost("another process lost what it works with")

    def handle(self, signum: int, frame: FrameType | None = None) -> None:
        """The first signal asks; a second one ends the process at once, as a kill would: the
        checkpoints stand that.
        """
        del frame
        now = time.monotonic()
        if not self.signum:
            self.signum = signum
            self.asked = now
            name = signal.Signals(signum).name
            if is_main():
                _write(
                    f"unmaskrl: {name}: stopping at the next exact point with a checkpoint; once "
                    "more: at once\n"
                )
            return
        if now - self.asked < (_SAME_SIGNAL if num_processes() > 1 else 0.0):
            return
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR)
        if is_main():
            _write("unmaskrl: stopped at once; what was not in a checkpoint is lost\n")
        _end_process(128 + signum)


@contextmanager
def signals_to(
    handle: Callable[[int, FrameType | None], Any], signals: tuple[int, ...] = SIGNALS
) -> Iterator[None]:
    """Hand signals over for as long as the block lasts: in the main thread, and not those that the
    caller ignores (nohup).
    """
    old: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in signals:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                old[signum] = signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def raise_stopped(signum: int, frame: FrameType | None = None) -> None:
    """A handler for commands that keep nothing, or keep it row by row: end where it stands."""
    del frame
    raise Stopped(signum)


def is_main() -> bool:
    """Whether this process is the one that prints, as the launcher's environment says."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """Processes of the run, as the launcher's environment says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _write(text: str) -> None:
    # not sys.stderr: a handler may run in the middle of another write to it
    os.write(2, text.encode())
