"""``u.train``: the command's own run from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..recipes.checks import warnings_for
from ..recipes.cost import model_grid
from ..recipes.load import load_method
from ..reporting.progress import Progress, summary_table
from ..tasks import TrlReward
from ..utils.files import json_text
from ..utils.stopping import is_main
from ..utils.terminal import PlainConsole
from .loop import train as run_recipe


class Summary(dict[str, Any]):
    """What a run left: before and after by weights, minutes, the report's path (summary.json)."""

    def __repr__(self) -> str:
        before = self["before"]["accuracy"]
        after = {name: row["accuracy"] for name, row in self["after"].items()}
        shown = ", ".join(f"{name} {100 * value:.1f}%" for name, value in after.items())
        return f"Summary(accuracy {100 * before:.1f}% -> {shown}; {Path(self['report']).parent})"


def train(
    recipe: str,
    *,
    rewards: Sequence[TrlReward] = (),
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> Summary:
    """Train as `unmaskrl train` does: a shipped recipe, a YAML file or a run's folder.

    ``changes`` are settings by name, ``**{"train.steps": 10}``. ``rewards`` are functions of TRL's
    contract beside those that the recipe names. ``resume`` continues a run exactly, ``force`` moves
    one that is in the folder aside, ``quiet`` shows nothing. ValueError in one line on settings
    that do not fit.
    """
    words = [f"{name}={json_text(value)}" for name, value in changes.items()]
    config, method = load_method(recipe, words)
    console = PlainConsole(quiet=quiet or not is_main())  # a table per process would be 64 tables
    for note in warnings_for(config, method, model_grid(config.model)):
        console.print(f"warning: {note}", style="yellow")
    progress = Progress(None if quiet or not is_main() else console)
    summary = run_recipe(config, resume=resume, force=force, progress=progress, rewards=rewards)
    console.print(
        summary_table(
            summary["before"], summary["after"], summary["wall_minutes"], summary["report"]
        )
    )
    return Summary(summary)
