"""What to type next, after a command was stopped or has ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.stopping import Stopped, num_processes
from .arguments import Arguments, EvalArguments, PriorArguments

if TYPE_CHECKING:
    from ..recipes.schema import Recipe


def way_on(stopped: Stopped, args: Arguments, words: Sequence[str]) -> str:
    """How the stopped command goes on: each in its own way."""
    name = args.command
    if name in ("train", "sft"):
        if not stopped.resumable:
            return f"no step was begun: start it again with {_command(words)}"
        again = [word for word in words if word not in ("--force", "--resume")]
        return f"go on with: {_command([*again, '--resume'])}"
    kept = _kept(args)
    if kept is not None and kept.exists():
        return f"what is finished is in {kept}: go on with the same command, {_command(words)}"
    if name == "eval" and kept is None:
        return "nothing is kept; with --json or --items it can go on when it is started again"
    return "nothing is kept: start it again"


def what_next(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    """Where a finished run's model is, its size, and what to do with it."""
    out = Path(summary["report"]).parent
    task = recipe.task["name"]
    return [
        *(f"wrote {folder}: {what}" for folder, what in written(out)),
        f"next: unmaskrl eval {shlex.quote(str(out))} --task {task}   (or sample, frontier; more "
        "steps: train ... --resume)",
    ]


def written(out: Path) -> list[tuple[Path, str]]:
    """The model folders of a run, and what is in each."""
    names = {"model": "the model", "model-raw": "the weights without averaging"}
    result = []
    for name, what in names.items():
        folder = out / name
        if not folder.is_dir():
            continue
        kind = (
            "" if (folder / "config.json").is_file() else " as an adapter, to be loaded on its base"
        )
        result.append((folder, f"{what}{kind}, {_megabytes(folder):.1f} MB"))
    return result


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _kept(args: Arguments) -> Path | None:
    """Where a command keeps finished rows until its result is written."""
    if isinstance(args, PriorArguments):
        return Path(f"{args.out}.partial")
    if isinstance(args, EvalArguments):
        from .eval import items_path

        return items_path(args)
    return None


def _command(words: Sequence[str]) -> str:
    """The command line as it was typed, or what a launcher has to start on every process."""
    started = Path(sys.argv[0]).name
    program = "python -m unmaskrl" if started == "__main__.py" else "unmaskrl"
    line = f"{program} {shlex.join(words)}"
    return (
        f"{line} (by the same launcher, on {num_processes()} processes)"
        if num_processes() > 1
        else line
    )
