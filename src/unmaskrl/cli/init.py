"""`unmaskrl init`: a folder with a task, a reward and a recipe that run as they are."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..utils.files import write_whole
from ..utils.terminal import PlainConsole
from .arguments import InitArguments

STARTER = Path(__file__).parent / "starter"
# What is written, and what each file holds.
FILES = {
    "own_task.py": "a task: problems, prompts, a judge",
    "own_reward.py": "a reward beside the judge's",
    "recipe.yaml": "a recipe with both, on the shipped base",
    "README.md": "what to type, and what to change",
}


def init_command(args: InitArguments) -> int:
    """unmaskrl init."""
    folder = Path(args.folder)
    _check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    console = PlainConsole()
    for name, what in FILES.items():
        text = (STARTER / name).read_text(encoding="utf-8")
        write_whole(folder / name, lambda part, t=text: part.write_text(t, encoding="utf-8"))
        console.print(f"wrote {folder / name}: {what}", soft_wrap=True)
    there = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    console.print(f"next: {there}unmaskrl train recipe.yaml   (a minute at most)", soft_wrap=True)
    return 0


def _check_new(folder: Path) -> None:
    """Nothing of the user's is written over: the folder is empty, or not there."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to nothing; name a new folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder")
    names = sorted(file.name for file in folder.iterdir())
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{folder} is not empty ({shown}); name a new folder")
