"""`unmaskrl recipes`: the shipped ones."""

from __future__ import annotations

from ..recipes.files import PARTS, RECIPES, headline, is_diffpo, is_method, part_names, recipe_names
from ..utils.terminal import PlainConsole


def recipes_command() -> int:
    """unmaskrl recipes: the shipped ones, methods apart from tasks and from the supervised recipes
    of the bases.
    """
    console = PlainConsole()
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
            line = f"  {name:{width}}  {headline(RECIPES / f'{name}.yaml')}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print()
    console.print(
        "Large runs, MODEL-TASK-METHOD, e.g. llada-8b-gsm8k-stp (docs/scaling.md)",
        style="bold",
        highlight=False,
    )
    for kind in ("model", "task", "method"):
        for name in part_names(kind):
            line = f"  {kind:6}  {name:{width - 8}}  {headline(PARTS / kind / f'{name}.yaml')}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0
