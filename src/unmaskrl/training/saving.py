"""When a run is saved, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..reporting.progress import Progress
from ..utils.stopping import Lost, Stopped
from .resume import save_run
from .state import Training


def is_late(run: Training) -> bool:
    """Whether the last checkpoint is older than run.save_minutes, by this process's clock."""
    minutes = run.recipe.run.save_minutes
    return minutes is not None and time.monotonic() - run.saved_at >= 60 * minutes


def save(run: Training, progress: Progress) -> None:
    """Checkpoint, unless there is one of this update; a full disk is said, and training goes on
    with the last good one.
    """
    if run.saved == run.updates:
        return
    failed = ""
    try:
        save_run(run)
    except OSError as error:  # of the main process, which writes
        failed = str(error)
        progress.warn(failed)
    run.saved_at = time.monotonic()
    run.unsaved = failed
    if run.most(float(bool(failed))):
        run.saved = -1  # on every rank: they save together or not at all


@contextmanager
def saved_if_stopped(run: Training, progress: Progress) -> Iterator[None]:
    """After a signal a checkpoint of where the run stands, and Stopped says so; likewise where a
    server is lost.
    """
    try:
        yield
    except Stopped as stopped:
        save(run, progress)
        raise Stopped(stopped.signum, where_it_stands(run), resumable=True) from None
    except Lost as lost:
        save(run, progress)
        raise Lost(f"{lost}; {where_it_stands(run)}; go on with --resume") from None


def where_it_stands(run: Training) -> str:
    """For whoever stopped the run: how far it came, and what it can go on from."""
    inner = f", inner update {run.inner} of {run.recipe.train.num_iterations}" if run.inner else ""
    place = f"stopped at step {run.step} of {run.recipe.train.steps}{inner}"
    if run.unsaved:
        return f"{place}, but {run.unsaved}"
    return f"{place}; all of it is in {run.out / 'checkpoints'}"
