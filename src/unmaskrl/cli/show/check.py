"""`unmaskrl check`: the resolved recipe, its cost per step, its memory plan, warnings."""

from __future__ import annotations

import sys

import yaml
from rich.table import Table

from ...recipes.checks import block_notes, check_blocks, warnings_for
from ...recipes.cost import Cost, model_grid, step_cost
from ...recipes.engines import engine_line
from ...recipes.load import load_method
from ...utils.plain_text import printable
from ...utils.terminal import PlainConsole
from ..arguments import CheckArguments
from .memory import print_memory


def check_command(args: CheckArguments) -> int:
    """unmaskrl check: the resolved recipe, its cost per step, its memory plan, warnings."""
    recipe, method = load_method(args.recipe, args.overrides)
    text = yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110
    )
    if args.yaml:
        sys.stdout.write(text)  # a file for `unmaskrl train`: nothing else may stand in it
        sys.stderr.writelines(
            f"unmaskrl: warning: {printable(note)}\n" for note in warnings_for(recipe, method)
        )
        return 0
    grid = model_grid(recipe.model)
    check_blocks(recipe, method, grid)
    console = PlainConsole()
    console.print(text, soft_wrap=True)
    cost = step_cost(recipe, method)
    console.print(cost_table(recipe.name, cost))
    block = cost.logits_bytes / 2**20
    full = cost.full_logits_bytes / 2**20
    console.print(
        f"peak logits: {cost.logits_bytes} bytes ({block:.1f} MiB; all at once: {full:.1f} MiB)",
        highlight=False,
    )
    console.print(engine_line(recipe), highlight=False)
    print_memory(recipe, method, console, args.processes)
    for note in [*warnings_for(recipe, method, grid), *block_notes(recipe, grid)]:
        console.print(f"warning: {note}", style="yellow", highlight=False)
    return 0


def cost_table(name: str, cost: Cost) -> Table:
    """Row-calls of a step, and of one of its updates on average."""
    table = Table(
        "row-calls, at most",
        "per step",
        f"per update ({cost.num_iterations} a step)",
        title=f"{name}: {cost.parameters / 1e6:.2f}M parameters",
    )
    rows = {
        f"rollout ({cost.rollout_per_row} calls per row)": cost.rollout,
        "old policy": cost.old,
        "reference policy": cost.ref,
        "new policy, forward and backward": cost.new,
        "in forward passes (backward = 2)": cost.forwards,
    }
    for label, calls in rows.items():
        table.add_row(label, f"{calls}", f"{cost.per_update(calls):.6g}")
    return table
