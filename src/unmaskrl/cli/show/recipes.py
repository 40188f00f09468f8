"""`unmaskrl recipes`: the shipped ones, one as it is, a copy of one."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from ...recipes.files import (
    about,
    headline,
    is_diffpo,
    is_method,
    part_names,
    part_path,
    recipe_names,
    recipe_text,
)
from ...utils.files import check_output, write_whole
from ...utils.terminal import PlainConsole
from ..arguments import RecipesArguments


def recipes_command(args: RecipesArguments) -> int:
    """unmaskrl recipes."""
    if args.name is None:
        if args.copy is not None:
            raise ValueError("--copy needs the name of a recipe: unmaskrl recipes NAME --copy F")
        list_recipes(PlainConsole())
        return 0
    text = recipe_text(args.name)
    if args.copy is None:
        sys.stdout.write(text)
        return 0
    path = Path(args.copy)
    if path.exists():
        raise ValueError(f"--copy: {path} exists; name a new file")
    check_output(path, "--copy")
    write_whole(path, lambda part: part.write_text(text))
    PlainConsole().print(
        f"wrote {path}; try: unmaskrl check {path}", highlight=False, soft_wrap=True
    )
    return 0


def list_recipes(console: Console) -> None:
    """The shipped ones: methods apart from tasks and from the supervised recipes of the bases."""
    names = recipe_names()
    bases = [name for name in names if name.endswith("-base")]
    parts = {
        "Published methods, each a preset on sudoku (docs/papers.md)": [
            name for name in names if is_method(name)
        ],
        "DiFFPO and its ablations (docs/diffpo.md)": [name for name in names if is_diffpo(name)],
        "Tasks (docs/recipes.md)": [
            n for n in names if not is_method(n) and not is_diffpo(n) and n not in bases
        ],
        "Bases, for `unmaskrl sft`": bases,
    }
    width = max(map(len, names))
    for title, part in parts.items():
        console.print(title, style="bold", highlight=False, soft_wrap=True)
        for name in part:
            line = f"  {name:{width}}  {about(name)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print()
    console.print(
        "Large runs, MODEL-TASK-METHOD, e.g. llada-8b-gsm8k-stp (docs/scaling.md)",
        style="bold",
        highlight=False,
    )
    for kind in ("model", "task", "method"):
        for name in part_names(kind):
            line = f"  {kind:6}  {name:{width - 8}}  {headline(part_path(kind, name))}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
