"""`unmaskrl train`: a run with its progress, and what to type next."""

from __future__ import annotations

from ..recipes.checks import warnings_for
from ..recipes.cost import model_grid
from ..recipes.load import load_method
from ..reporting.progress import Progress, summary_table
from ..training.loop import train
from ..utils.stopping import is_main
from ..utils.terminal import PlainConsole
from .arguments import TrainArguments
from .hints import what_next


def train_command(args: TrainArguments) -> int:
    """unmaskrl train."""
    recipe, method = load_method(args.recipe, args.overrides)
    console = PlainConsole(quiet=not is_main())  # a table per process would be 64 tables
    for note in warnings_for(recipe, method, model_grid(recipe.model)):
        console.print(f"warning: {note}", style="yellow")
    progress = Progress(None if args.quiet or not is_main() else console)
    summary = train(recipe, resume=args.resume, force=args.force, progress=progress)
    console.print(
        summary_table(
            summary["before"], summary["after"], summary["wall_minutes"], summary["report"]
        )
    )
    for line in what_next(recipe, summary):
        console.print(line, soft_wrap=True)
    if summary["unsaved"]:
        raise OSError(f"the run is complete, but {summary['unsaved']}")
    return 0
