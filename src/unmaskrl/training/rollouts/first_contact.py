"""A served engine is held against the trainer before the first update: greedy tokens, and some of
its rollouts scored.

What a server could not be asked shows here: other weights, another vocabulary, another block
length or threshold, a broken kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.canvas import blank_canvas
from ...core.estimators import trajectory
from ...core.rng import named_generator
from ...core.rollouts import LocalRollouts, Placed
from ...core.scoring import frozen_token_logps, replay_views
from ...core.types import Canvas, Rollout
from ...models.denoiser import ModelDenoiser
from ...recipes.registry import settings_at
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
            try:
                refusal = _refusal(run, policy)
            except ValueError as error:  # the others must hear of it
                refusal = str(error)
    if run.most(float(bool(refusal))):
        raise ValueError(refusal or "the main process refuses the rollouts' engine")


def _refusal(run: Run, policy: ModelDenoiser) -> str:
    """Why the engine cannot be used; nothing if it can, and then what was seen is told."""
    d = run.recipe.decode
    share = agreement(run, policy)
    least = getattr(run.rollouts, "agreement", 0.0)
    name = f"rollouts {run.recipe.rollouts['name']}"
    if share < least:
        return (
            f"{name}: of its greedy tokens {share:.0%} are those that the trainer decodes with the "
            f"same weights, {least:.0%} are asked for: another threshold (decode.gamma), block "
            "length or model, or kernels that differ (rollouts.agreement)"
        )
    rollout = run.rollouts.sample(
        _canvas(run, policy, NUM_SCORED, d.gen_length),
        settings_at(d, d.temperature),
        named_generator(run.recipe.run.seed, "first_contact"),
        d.gamma,
    )
    said = f"{name}: {share:.0%} of its greedy tokens are the trainer's"
    if "step_maps" not in run.rollouts.features:
        run.progress.note(f"{said}; no step maps, so its rollouts cannot be replayed")
        return ""
    scores, drawn = replayed(run, policy, rollout)
    mean = float(scores[drawn].mean())
    uniform = -math.log(policy.vocab_size)
    if not mean > uniform - WORSE:
        return (
            f"{name}: the trainer gives tokens of its rollouts {mean:.2f} nats on average, less "
            f"than those of a uniform draw ({uniform:.2f}): they are not this policy's"
        )
    said = f"{said}; {NUM_SCORED} rollouts score {mean:.3f} nats per token"
    if "shown_logps" in run.rollouts.features:
        gaps = (scores - rollout.behavior_logps)[drawn].abs()
        said += f", its own log-probabilities differ by {gaps.mean():.2g} on average"
        said += f", {gaps.max():.2g} at most"
    run.progress.note(said)
    return ""


def agreement(run: Run, policy: ModelDenoiser) -> float:
    """Share of greedy tokens before the first difference, over prompts of several lengths."""
    d = run.recipe.decode
    canvas = _canvas(run, policy, NUM_GREEDY, min(d.gen_length, GREEDY_TOKENS))
    settings = settings_at(d, 0.0)
    theirs = run.rollouts.sample(canvas, settings, None, d.gamma)
    ours = LocalRollouts(policy).sample(canvas, settings, None, d.gamma)
    wanted = ours.completion_mask
    same = (theirs.ids == ours.ids) | ~wanted
    reached = same.long().cumprod(-1).bool() & wanted
    return float(reached.sum() / wanted.sum())


def replayed(run: Run, policy: ModelDenoiser, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The trainer's log-probabilities of the tokens at the calls that revealed them, and which
    tokens these are.
    """
    views = replay_views(rollout, policy.mask_id)
    scores = frozen_token_logps(policy, rollout, trajectory(), views, max_canvases=run.max_canvases)
    return scores, rollout.action_mask & (rollout.decoded_step <= rollout.nfe[:, None])


def _canvas(run: Run, policy: ModelDenoiser, count: int, gen_length: int) -> Canvas:
    problems: Any = run.problems
    indices = [i % len(problems.examples) for i in range(count)]
    return blank_canvas(
        [problems.prompt(i) for i in indices],
        gen_length=gen_length,
        denoiser=policy,
        row_ids=torch.arange(count).tolist(),
        device=policy.device,
    )
