"""From problems to rewarded rollouts: prompts, anchors, decoding, rewards.

One step is a pure function of (weights, seed, step), so it can be repeated exactly after a crash
and split over ranks by whole groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.canvas import anchored_canvas
from ...core.decoding import Gamma, planned_calls
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
    t = recipe.train
    prompts = []
    given = []
    row_ids = []
    group_ids = []
    examples = []
    for position, index in enumerate(problems.indices(step)):
        if position % num_ranks != rank:
            continue
        group = step * t.prompts_per_step + position
        rows = [group * t.group_size + i for i in range(t.group_size)]
        prompts += [problems.prompt(index)] * t.group_size
        given += anchors.of_group(index, step, share_done, rows)
        row_ids += rows
        group_ids += [group] * t.group_size
        examples += [problems.examples[index]] * t.group_size
    canvas = anchored_canvas(
        prompts,
        given,
        gen_length=recipe.decode.gen_length,
        denoiser=denoiser,
        row_ids=row_ids,
        group_ids=group_ids,
        device=denoiser.device,
    )
    rollout = _sampled(recipe, rollouts, canvas, step, gamma_of)
    ids = rollout.completions()
    texts = decode_texts(problems.tokenizer, ids)
    context = CallContext(
        completion_ids=ids,
        trainer_state=TrainerState(
            global_step=step,
            max_steps=t.steps,
            epoch=step * t.prompts_per_step / len(problems.examples),
        ),
        run_name=recipe.name,
    )
    grades = grade(problems.task, examples, texts, context, functions)
    return Rewarded(
        rollout=rollout,
        examples=examples,
        texts=texts,
        rewards=torch.tensor(grades.totals()),
        parts=grades.parts,
        correct=torch.tensor(grades.correct),
        anchored=torch.tensor([bool(a) for a in given]),
        unscored=grades.unscored(),
        logged={name: sum(values) / len(values) for name, values in context.metrics.items()},
        extra=context.extra,
    )


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
    blocks = [decode.block_length] * (decode.gen_length // decode.block_length)
    if selection_rule(decode.select).prefix is not None:
        return decode.gen_length  # a token per call, where the rule decides as it goes
    return planned_calls(blocks, decode.gen_length, decode.steps, decode.exit_at)
