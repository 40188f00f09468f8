"""What surrounds the steps of any run: it is built, goes on from its checkpoint, hears signals, and
is closed whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..core.finite import NotFiniteError
from ..recipes.schema import Recipe, SFTRecipe
from ..reporting.progress import Progress
from ..utils.stopping import signals_to
from .bad_updates import explained
from .folder.run_folder import folder_of
from .folder.sessions import add_session
from .resume import load_run
from .saved_models import saving_notes
from .state import Training
from .trackers import start_trackers

R = TypeVar("R", bound=Training)
T = TypeVar("T")


def conduct(
    recipe: Recipe | SFTRecipe,
    start: Callable[[], R],
    go_on: Callable[[R], T],
    *,
    resume: bool,
    progress: Progress | None,
) -> T:
    """Start a run, or go on with it (``resume``), and return what ``go_on`` makes of it."""
    progress = progress or Progress()
    out = folder_of(recipe.run.out, recipe.name, recipe.run.seed)
    progress.start(recipe.train.steps, f"{recipe.name} seed {recipe.run.seed}: {out}")
    progress.phase(f"loading {recipe.model.path or 'a new model'} and the problems")
    try:
        run = start()
    except BaseException:
        progress.stop()
        raise
    run.progress = progress
    try:
        notes = load_run(run) if resume else []
        if run.accelerator.is_main_process:
            add_session(run.out, run.accelerator.num_processes)
        start_trackers(run)
        for note in [*notes, *run.notes, *saving_notes(run)]:
            progress.note(note)
        with signals_to(run.stop.handle):
            return go_on(run)
    except NotFiniteError as error:
        raise explained(run, error) from None
    finally:
        progress.stop()
        run.accelerator.end_training()
        if run.lock is not None:
            run.lock.release()
