"""A served engine is held against the trainer before the first update: greedy tokens, and some of
its rollouts scored.

What a server could not be asked shows here: other weights, another vocabulary, another block
length or threshold, a broken kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...core.canvas import blank_canvas
from ...core.estimators import trajectory
from ...core.rng import named_generator
from ...core.rollouts import LocalRollouts, Placed, Rollouts
from ...core.scoring import frozen_token_logps, replay_views
from ...core.types import Canvas, Rollout
from ...models.denoiser import ModelDenoiser
from ...recipes.registry import settings_at
from ...recipes.schema import DecodeConfig, Recipe
from ..state import Run

NUM_SCORED = 20
NUM_GREEDY = 16
GREEDY_TOKENS = 32
WORSE = 1.0  # nats below a uniform draw, from which on tokens are not the policy's


def first_contact(run: Run) -> None:
    """Hand over the unchanged weights, decode and score; ValueError on every rank if the engine is
    not the trainer's model. Nothing for an engine in this process.
    """
    if not isinstance(run.rollouts, Placed):
        return
    refusal = ""
    with run.droppable(), run.inference() as policy:
        run.rollouts.sync()
        if run.accelerator.is_main_process:
            problems = run.problems
            prompts = [
                problems.prompt(i % len(problems.examples))
                for i in range(max(NUM_SCORED, NUM_GREEDY))
            ]
            try:
                run.progress.note(seen(run.rollouts, policy, prompts, run.recipe, run.max_canvases))
            except ValueError as error:  # the others must hear of it
                refusal = str(error)
    if run.most(float(bool(refusal))):
        raise ValueError(refusal or "the main process refuses the rollouts' engine")


def seen(
    rollouts: Rollouts,
    policy: ModelDenoiser,
    prompts: Sequence[Sequence[int]],
    recipe: Recipe,
    max_canvases: int,
) -> str:
    """What the engine does with the trainer's weights, in a line; ValueError if it has others."""
    d = recipe.decode
    name = f"rollouts {recipe.rollouts['name']}"
    share = agreement(rollouts, policy, prompts[:NUM_GREEDY], d)
    least = getattr(rollouts, "agreement", 0.0)
    if share < least:
        raise ValueError(
            f"{name}: of its greedy tokens {share:.0%} are those that the trainer decodes with the "
            f"same weights, {least:.0%} are asked for: another threshold (decode.gamma), block "
            "length or model, or kernels that differ (rollouts.agreement)"
        )
    said = f"{name}: {share:.0%} of its greedy tokens are the trainer's"
    rollout = rollouts.sample(
        _canvas(policy, prompts[:NUM_SCORED], d.gen_length),
        settings_at(d, d.temperature),
        named_generator(recipe.run.seed, "first_contact"),
        d.gamma,
    )
    if "step_maps" not in rollouts.features:
        return f"{said}; without step maps its rollouts cannot be replayed"
    scores, drawn = replayed(policy, rollout, max_canvases)
    mean = float(scores[drawn].mean())
    uniform = -math.log(policy.vocab_size)
    if not mean > uniform - WORSE:
        raise ValueError(
            f"{name}: the trainer gives tokens of its rollouts {mean:.2f} nats on average, less "
            f"than those of a uniform draw ({uniform:.2f}): they are not this policy's"
        )
    said += f"; {len(rollout.ids)} rollouts score {mean:.3f} nats per token"
    if "shown_logps" in rollouts.features:
        gaps = (scores - rollout.behavior_logps)[drawn].abs()
        said += f", its own log-probabilities differ by {gaps.mean():.2g} on average"
        said += f", {gaps.max():.2g} at most"
    return said


def agreement(
    rollouts: Rollouts, policy: ModelDenoiser, prompts: Sequence[Sequence[int]], d: DecodeConfig
) -> float:
    """Share of greedy tokens before a row's first difference, with one set of weights."""
    canvas = _canvas(policy, prompts, min(d.gen_length, GREEDY_TOKENS))
    settings = settings_at(d, 0.0)
    theirs = rollouts.sample(canvas, settings, None, d.gamma)
    ours = LocalRollouts(policy).sample(canvas, settings, None, d.gamma)
    wanted = ours.completion_mask
    same = (theirs.ids == ours.ids) | ~wanted
    reached = same.long().cumprod(-1).bool() & wanted
    return float(reached.sum() / wanted.sum())


def replayed(policy: ModelDenoiser, rollout: Rollout, max_canvases: int) -> tuple[Tensor, Tensor]:
    """The trainer's log-probabilities of the tokens at the calls that revealed them, and which
    tokens these are.
    """
    views = replay_views(rollout, policy.mask_id)
    scores = frozen_token_logps(policy, rollout, trajectory(), views, max_canvases=max_canvases)
    return scores, rollout.action_mask & (rollout.decoded_step <= rollout.nfe[:, None])


def _canvas(policy: ModelDenoiser, prompts: Sequence[Sequence[int]], gen_length: int) -> Canvas:
    return blank_canvas(
        prompts,
        gen_length=gen_length,
        denoiser=policy,
        row_ids=range(len(prompts)),
        device=policy.device,
    )
