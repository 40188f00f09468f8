"""How long a prompt may be. A prompt is never cut: one without its question or its rules is
another problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..models.tokenizer import encode_prompt
from ..recipes.schema import Recipe
from ..tasks import Example, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """The problems whose prompts fit, their prompts as ids, and what to tell of the others."""

    examples: list[Example]
    prompts: list[list[int]]
    dropped: int
    notes: list[str]


def fitting(
    recipe: Recipe, task: Task, tokenizer: Any, examples: Sequence[Example], max_length: int
) -> Fitting:
    """Hold examples against train.max_prompt_length and the model's ``max_length`` positions.

    A longer prompt is refused with a ValueError, or dropped (train.long_prompts); beyond the model
    it is always refused.
    """
    limit = recipe.train.max_prompt_length
    total = len(examples)
    prompts = [encode_prompt(tokenizer, task.prompt(example)) for example in examples]
    kept = [i for i, prompt in enumerate(prompts) if limit is None or len(prompt) <= limit]
    notes = []
    if len(kept) < total:
        long = (
            f"{total - len(kept)} of {total} prompts of task {task.name} are longer than "
            f"train.max_prompt_length {limit}"
        )
        long += f" (the longest has {max(map(len, prompts))} tokens)"
        if recipe.train.long_prompts == "refuse" or not kept:
            leave_out = ", or leave long ones out with train.long_prompts=drop" if kept else ""
            raise ValueError(f"{long}: raise it{leave_out}")
        notes = [f"{long} and were dropped"]
    fits = [prompts[i] for i in kept]
    check_room(fits, recipe.decode.gen_length, max_length)
    return Fitting(
        examples=[examples[i] for i in kept], prompts=fits, dropped=total - len(kept), notes=notes
    )


def check_room(prompts: Sequence[Sequence[int]], gen_length: int, max_length: int) -> None:
    """Refuse prompts that leave no room for ``gen_length`` completion tokens among the model's
    positions.
    """
    room = max_length - gen_length
    longest = max(map(len, prompts), default=0)
    if prompts and longest > room:
        drop = (
            f", or in training set train.max_prompt_length={room} train.long_prompts=drop"
            if room > 0
            else ""
        )
        raise ValueError(
            f"{sum(len(prompt) > room for prompt in prompts)} of {len(prompts)} prompts (the "
            f"longest has {longest} tokens) and "
            f"decode.gen_length {gen_length} exceed the model's {max_length} positions: lower "
            f"gen_length{drop}"
        )
