"""The memory plan as `unmaskrl check` and `unmaskrl train` show it (shell)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from .config import Recipe, asset
from .memory import (
    ASSUMED_PROMPT,
    CARDS,
    GIB,
    HEADROOM,
    ModelShape,
    Plan,
    Setup,
    memory_plan,
    model_shape,
    size_text,
    verdict,
)
from .rollouts import Problems, make_task
from .tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .run import Run

_PROMPTS = 64  # problems whose prompts are counted


def print_memory(recipe: Recipe, console: Console, processes: int = 1) -> None:
    """The plan's table and one line per card, and for this machine's RAM where there is no GPU."""
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    cuda, (tokens, counted) = torch.cuda.is_available(), prompt_tokens(recipe)
    shape = model_shape(recipe.model.path)
    setup = Setup.of(recipe, processes=processes, prompt_tokens=tokens, cuda=cuda)
    console.print(memory_table(memory_plan(shape, setup)))
    source = "the longest of the first training prompts" if counted else "assumed: no tokenizer or no problems at hand"
    console.print(f"canvas: {tokens} tokens of prompt ({source}) and {recipe.decode.gen_length} of completion", highlight=False)
    cards = [verdict(shape, replace(setup, cuda=True), name, gib) for name, gib in CARDS.items()]
    for line in cards if cuda else [*cards, verdict(shape, setup, *this_machine(processes))]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"computed, not measured; a plan that fits leaves {1 - HEADROOM:.0%} of the memory free", highlight=False)


def memory_table(plan: Plan) -> Table:
    """One row per part, and the peak."""
    s = plan.setup
    table = Table(
        f"{'GPU memory' if s.cuda else 'RAM'} per process ({s.processes} in all)", "size", title="memory plan, upper bounds"
    )
    for name, size in _rows(plan):
        table.add_row(name, size_text(size))
    table.add_section()
    table.add_row("peak: what stays, and the largest of update, rollout, step", size_text(plan.total))
    return table


def memory_notes(run: Run) -> list[str]:
    """A line before a run's first step: does the plan fit this machine, and what to change if not."""
    if run.step or run.inner:
        return []
    model: Any = run.denoiser.model
    shape, a = ModelShape.of(model.config.to_dict()), run.accelerator
    tokens, cuda = longest_prompt(run.problems), a.device.type == "cuda"
    setup = Setup.of(run.recipe, processes=a.num_processes, prompt_tokens=tokens, cuda=cuda)
    return [f"memory plan: {verdict(shape, setup, *this_machine(a.num_processes))}"]


def longest_prompt(problems: Problems) -> int:
    """Tokens of the longest of the first training prompts."""
    return max(len(problems.prompt(i)) for i in range(min(_PROMPTS, len(problems.examples))))


def prompt_tokens(recipe: Recipe) -> tuple[int, bool]:
    """``longest_prompt`` and True, or an assumption and False where the tokenizer or the task's data is not at hand."""
    path = asset(recipe.model.path)
    if not Path(path).is_dir() or not has_tokenizer(Path(path)):
        return ASSUMED_PROMPT, False
    try:
        return longest_prompt(Problems(recipe, make_task(recipe), load_tokenizer(path), sys.maxsize)), True
    except (ValueError, OSError):
        return ASSUMED_PROMPT, False


def this_machine(processes: int) -> tuple[str, float]:
    """Name and GiB of what one process of a run here has: the first GPU, else its share of the RAM."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return f"{card.name} {card.total_memory / GIB:.0f} GiB", card.total_memory / GIB
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    share = f" / {processes}" if processes > 1 else ""
    return f"RAM, {gib:.0f} GiB{share}", gib / processes


def _rows(plan: Plan) -> Iterator[tuple[str, float]]:
    s = plan.setup
    yield from plan.stays.items()
    yield f"update: activations, {s.alive} canvases of {s.length} tokens", plan.activations
    beside = max(0.0, plan.update - plan.activations)
    yield f"update: beside them (peak logits are {size_text(plan.logits)})", beside
    yield f"rollout: {s.train_rows} rows (evaluation: {s.eval_rows})", plan.rollout
    if plan.step:
        yield "optimiser step", plan.step
