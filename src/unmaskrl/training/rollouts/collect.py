"""From problems to rewarded rollouts: prompts, anchors, decoding, rewards.

One step is a pure function of (weights, seed, step), so it can be repeated exactly after a crash
and split over ranks by whole groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.canvas import anchored_canvas
from ...core.decoding import Gamma, planned_calls, whole_blocks
from ...core.rng import named_generator
from ...core.rollouts import Rollouts
from ...core.types import Canvas, Rollout
from ...models.denoiser import ModelDenoiser
from ...models.tokenizer import decode_texts
from ...recipes.registry import selection_rule, settings_at
from ...recipes.schema import DecodeConfig, Recipe
from ...tasks import CallContext, TrainerState, TrlReward, grade
from .anchors import Anchors
from .problems import Problems, Rewarded


def rollout_step(
    recipe: Recipe,
    problems: Problems,
    anchors: Anchors,
    rollouts: Rollouts,
    denoiser: ModelDenoiser,
    functions: dict[str, TrlReward],
    step: int,
    share_done: float,
    rank: int = 0,
    num_ranks: int = 1,
    gamma_of: Callable[[Tensor, Tensor], Gamma] | None = None,
) -> Rewarded:
    """Decode and reward this rank's groups of one step; row ids are global, so ranks and batches
    change nothing.

    ``rollouts`` decodes; ``denoiser`` says which ids are special and where tensors belong.
    ``gamma_of(prompt_mask, row_ids)``: a threshold policy's ``gamma`` in place of the recipe's
    number.
    """
    indices = problems.indices(step)
    own = range(rank, len(indices), num_ranks)  # positions in the step
    size = recipe.train.group_size
    groups = [step * recipe.train.prompts_per_step + position for position in own]
    rows = [[group * size + i for i in range(size)] for group in groups]
    given = [
        anchors.of_group(indices[position], step, share_done, ids)
        for position, ids in zip(own, rows, strict=True)
    ]
    examples = [problems.examples[indices[position]] for position in own for _ in range(size)]
    canvas = anchored_canvas(
        [problems.prompt(indices[position]) for position in own for _ in range(size)],
        [anchors_of_row for group in given for anchors_of_row in group],
        gen_length=recipe.decode.gen_length,
        denoiser=denoiser,
        row_ids=[row for ids in rows for row in ids],
        group_ids=[group for group in groups for _ in range(size)],
        device=denoiser.device,
    )
    rollout = _sampled(recipe, rollouts, canvas, step, gamma_of)
    ids = rollout.completions()
    texts = decode_texts(problems.tokenizer, ids)
    context = _context(recipe, step, ids, len(problems.examples))
    grades = grade(problems.task, examples, texts, context, functions)
    return Rewarded(
        rollout=rollout,
        examples=examples,
        texts=texts,
        rewards=torch.tensor(grades.totals()),
        parts=grades.parts,
        correct=torch.tensor(grades.correct),
        anchored=torch.tensor([bool(row) for group in given for row in group]),
        unscored=grades.unscored(),
        logged={name: sum(values) / len(values) for name, values in context.metrics.items()},
        extra=context.extra,
    )


def _context(recipe: Recipe, step: int, ids: list[list[int]], num_problems: int) -> CallContext:
    """What reward functions are told of the step."""
    state = TrainerState(
        global_step=step,
        max_steps=recipe.train.steps,
        epoch=step * recipe.train.prompts_per_step / num_problems,
    )
    return CallContext(completion_ids=ids, trainer_state=state, run_name=recipe.name)


def _sampled(
    recipe: Recipe,
    rollouts: Rollouts,
    canvas: Canvas,
    step: int,
    gamma_of: Callable[[Tensor, Tensor], Gamma] | None,
) -> Rollout:
    gamma: Gamma | None = recipe.decode.gamma
    if gamma_of is not None:
        gamma = gamma_of(canvas.prompt_mask, canvas.row_ids)
    return rollouts.sample(
        canvas,
        settings_at(recipe.decode, recipe.decode.temperature),
        named_generator(recipe.run.seed, "rollout", step),
        gamma,
    )


def most_calls(decode: DecodeConfig) -> int:
    """The most denoiser calls that decoding a batch can take."""
    blocks = whole_blocks(decode.gen_length, decode.block_length)
    if selection_rule(decode.select).prefix is not None:
        return decode.gen_length  # a token per call, where the rule decides as it goes
    return planned_calls(blocks, decode.gen_length, decode.steps, decode.exit_at)
