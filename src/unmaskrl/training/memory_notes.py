"""Whether a run's memory plan fits this machine, told before its first step; and what is done when
memory is exhausted all the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from ..models.families import named_family, parse_config
from ..models.hub import asset
from ..models.tokenizer import has_tokenizer, load_tokenizer
from ..recipes.cost import described_model
from ..recipes.memory import (
    ASSUMED_PROMPT,
    AUTO_ON_CPU,
    GIB,
    ModelShape,
    Setup,
    on_device,
    verdict,
)
from ..recipes.registry import make_task
from ..recipes.schema import Recipe
from .rollouts.problems import Problems

if TYPE_CHECKING:
    from .state import Run

T = TypeVar("T")
_PROMPTS = 64  # problems whose prompts are counted
NO_PLAN = "no memory plan: the model's family does not say what its linear layers are"


def memory_notes(run: Run) -> list[str]:
    """A line before a run's first step: does the plan fit this machine, and what to change if
    not. Where ``train.max_canvases=auto``, the number is chosen here.

    A run that goes on has the number of its checkpoint: on another machine the plan might give
    another, and sums would round differently.
    """
    if (run.step or run.inner) and run.max_canvases:
        return []
    config = run.denoiser.model.config
    _, family = parse_config(config.to_dict(), "the model", named_family(run.recipe.model.family))
    if not family.linears:
        run.max_canvases = run.max_canvases or AUTO_ON_CPU
        return [NO_PLAN]
    shape = ModelShape.of(config, family)
    a = run.accelerator
    name, gib = this_machine(a.num_processes)
    setup = Setup.of(
        run.recipe,
        shape,
        processes=a.num_processes,
        prompt_tokens=longest_prompt(run.problems),
        cuda=a.device.type == "cuda",
        method=run.method,
    )
    if setup.auto:
        # cards may differ: all ranks take the smallest number
        run.max_canvases = -int(run.most(-on_device(shape, setup, gib).max_canvases))
    return [f"memory plan: {verdict(shape, setup, name, gib)}"]


def longest_prompt(problems: Problems) -> int:
    """Tokens of the longest of the first training prompts."""
    return max(len(problems.prompt(i)) for i in range(min(_PROMPTS, len(problems.examples))))


def prompt_tokens(recipe: Recipe) -> tuple[int, bool]:
    """``longest_prompt`` and True, or an assumption and False where the tokenizer or the task's
    data is not at hand.
    """
    path = asset(recipe.model.path)
    if not Path(path).is_dir() or not has_tokenizer(Path(path)):
        return ASSUMED_PROMPT, False
    try:
        config, family = described_model(recipe.model)
        tokenizer = load_tokenizer(path, family=family, config=config)
        return longest_prompt(
            Problems(recipe, make_task(recipe.task), tokenizer, sys.maxsize)
        ), True
    except (ValueError, OSError):
        return ASSUMED_PROMPT, False


def this_machine(processes: int) -> tuple[str, float]:
    """Name and GiB of what one process of a run here has: the first GPU, else its share of the
    RAM.
    """
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return f"{card.name} {card.total_memory / GIB:.0f} GiB", card.total_memory / GIB
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    share = f" / {processes}" if processes > 1 else ""
    return f"RAM, {gib:.0f} GiB{share}", gib / processes


def with_fewer_canvases(run: Run, canvases: int, work: Callable[[int], T]) -> T:
    """``work(max_canvases)`` on so many canvases, again with half as many at once while the
    device's memory is exhausted.

    How many are alive changes no result but for rounding. ValueError if one alone is too much, and
    on sharded weights, whose ranks make their passes together.
    """
    while True:
        try:
            return work(run.max_canvases)
        except torch.OutOfMemoryError as error:
            reason = str(error).strip().partition("\n")[0]
        # here, because the error holds the tensors of the pass that failed
        alive = min(run.max_canvases, canvases)
        if run.sharded or alive <= 1:
            raise ValueError(
                f"step {run.step + 1}: out of memory with {alive} canvases alive ({reason}); lower "
                "train.max_canvases, or see what `unmaskrl check` proposes"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        run.max_canvases = alive // 2
        run.progress.note(
            f"step {run.step + 1}: out of memory with {alive} canvases alive; from here on "
            f"{run.max_canvases} (train.max_canvases)"
        )
