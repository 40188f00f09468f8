"""Training problems in seeded order, and what a step makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.rng import named_generator
from ...core.types import Rollout
from ...evaluation.prompts import fitting
from ...recipes.schema import Recipe
from ...tasks import Example, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """Rollouts of one step with their texts, rewards (B,), parts and correctness, on this rank.

    ``parts``: per reward function a float per row, or None where it abstains. ``unscored``: share
    of rows without any. ``dropped_calls``: denoiser calls of rollouts that others replaced, and of
    those that replaced none; ``asked_again`` and ``replaced`` count rows. ``logged`` and ``extra``:
    what reward functions gave to log_metric (means) and log_extra (per row).
    """

    rollout: Rollout
    examples: list[Example]
    texts: list[str]
    rewards: Tensor
    parts: dict[str, list[float | None]]
    correct: Tensor
    anchored: Tensor
    unscored: float = 0.0
    dropped_calls: int = 0
    asked_again: int = 0
    replaced: int = 0
    logged: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Problems:
    """Training problems in seeded order, as ids; epochs are reshuffled, and a step's prompts depend
    on its number.
    """

    def __init__(self, recipe: Recipe, task: Task, tokenizer: Any, max_length: int) -> None:
        self.recipe = recipe
        self.task = task
        self.tokenizer = tokenizer
        examples = task.examples("train")[: recipe.train.num_prompts]
        fits = fitting(recipe, task, tokenizer, examples, max_length)
        self.examples = fits.examples
        self.prompts = fits.prompts
        self.notes = [*task.notes, *fits.notes]
        if len(self.examples) < recipe.train.prompts_per_step:
            raise ValueError(
                f"task {task.name} has {len(self.examples)} training problems, fewer than "
                f"train.prompts_per_step {recipe.train.prompts_per_step}: lower it or give more "
                "problems"
            )

    def indices(self, step: int) -> list[int]:
        """Which problems step ``step`` (0-based) uses: consecutive entries of the epochs'
        permutations.
        """
        count = self.recipe.train.prompts_per_step
        size = len(self.examples)
        wanted = range(step * count, (step + 1) * count)
        orders: dict[int, list[int]] = {}
        for epoch in {i // size for i in wanted}:
            generator = named_generator(self.recipe.run.seed, "epoch", epoch)
            orders[epoch] = torch.randperm(size, generator=generator).tolist()
        return [orders[i // size][i % size] for i in wanted]

    def prompt(self, index: int) -> list[int]:
        """Prompt ids."""
        return self.prompts[index]
