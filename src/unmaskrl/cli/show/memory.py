"""The memory plan as `unmaskrl check` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from ...recipes.memory import (
    CARDS,
    HEADROOM,
    Plan,
    Setup,
    memory_plan,
    model_shape,
    on_device,
    size_text,
    verdict,
)
from ...recipes.registry import Method
from ...recipes.schema import Recipe
from ...training.memory_notes import NO_PLAN, prompt_tokens, this_machine


def print_memory(recipe: Recipe, method: Method, console: Console, processes: int = 1) -> None:
    """The plan's table and one line per card, and for this machine's RAM where there is no GPU."""
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    cuda = torch.cuda.is_available()
    (tokens, counted) = prompt_tokens(recipe)
    shape = model_shape(recipe.model)
    if shape is None:
        console.print(NO_PLAN, highlight=False)
        return
    setup = Setup.of(
        recipe, shape, processes=processes, prompt_tokens=tokens, cuda=cuda, method=method
    )
    name, gib = this_machine(processes)
    console.print(memory_table(memory_plan(shape, on_device(shape, setup, gib))))
    source = (
        "the longest of the first training prompts"
        if counted
        else "assumed: no tokenizer or no problems at hand"
    )
    console.print(
        f"canvas: {tokens} tokens of prompt ({source}) and {recipe.decode.gen_length} of "
        "completion",
        highlight=False,
    )
    cards = [verdict(shape, replace(setup, cuda=True), name, gib) for name, gib in CARDS.items()]
    for line in cards if cuda else [*cards, verdict(shape, setup, name, gib)]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"computed, not measured; a plan that fits leaves {1 - HEADROOM:.0%} of the memory free",
        highlight=False,
    )


def memory_table(plan: Plan) -> Table:
    """One row per part, and the peak."""
    s = plan.setup
    table = Table(
        f"{'GPU memory' if s.cuda else 'RAM'} per process ({s.processes} in all)",
        "size",
        title="memory plan, upper bounds",
    )
    for name, size in _rows(plan):
        table.add_row(name, size_text(size))
    table.add_section()
    table.add_row(
        "peak: what stays, and the largest of update, rollout, step", size_text(plan.total)
    )
    return table


def _rows(plan: Plan) -> Iterator[tuple[str, float]]:
    s = plan.setup
    yield from plan.stays.items()
    yield f"update: activations, {s.alive} canvases of {s.length} tokens", plan.activations
    beside = max(0.0, plan.update - plan.activations)
    yield f"update: beside them (peak logits are {size_text(plan.logits)})", beside
    yield f"rollout: {s.train_rows} rows (evaluation: {s.eval_rows})", plan.rollout
    if plan.step:
        yield "optimiser step", plan.step
