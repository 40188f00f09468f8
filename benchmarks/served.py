"""Rollouts on a real server: what it serves, how far it is from the trainer, how fast it is.

    python -m benchmarks.served RECIPE rollouts.url=http://host:port [key=value ...]

Run it once on a new build before a run is given to it: no update is made. The model of the recipe
is loaded here and handed to the server. Every line says what was seen; the exit code is 1 if the
server cannot be used.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.rng import named_generator
from unmaskrl.core.types import Rollout
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.served.facts import model_info, server_facts
from unmaskrl.models.served.sglang import Sglang
from unmaskrl.recipes.checks import check_blocks
from unmaskrl.recipes.engines import make_rollouts, refuse_unserved
from unmaskrl.recipes.load import load_method
from unmaskrl.recipes.registry import make_task, settings_at
from unmaskrl.recipes.schema import Recipe
from unmaskrl.training.rollouts.first_contact import NUM_SCORED, seen
from unmaskrl.training.rollouts.problems import Problems
from unmaskrl.training.setup import open_model

ALONE = 16  # prompts that are decoded one by one and at once


def look(recipe: Recipe, method: Any) -> None:
    """Print everything that a run would find out at its start, and what it would not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser, tokenizer, _ = open_model(recipe.model, device)
    check_blocks(recipe, method, denoiser.block_length)
    problems = Problems(recipe, make_task(recipe.task), tokenizer, denoiser.max_length)
    count = len(problems.examples)
    prompts = [problems.prompt(i % count) for i in range(NUM_SCORED)]
    engine = make_rollouts(recipe.rollouts, denoiser)
    assert isinstance(engine, Sglang), "this script is for rollouts.name=sglang"
    info = model_info(engine.client)
    say("the server tells", {**info, **server_facts(engine.client, info)})
    say("it serves", ", ".join(sorted(engine.features)) or "samples, and nothing more")
    refuse_unserved(recipe, method, engine)
    say("weights handed over, seconds", timed(engine.sync)[0])
    say("their version", engine.version)
    sys.stdout.write(f"{seen(engine, denoiser, prompts, recipe, NUM_SCORED)}\n")
    speed(engine, denoiser, prompts, recipe)
    together(engine, denoiser, prompts[:ALONE], recipe)


def speed(
    engine: Sglang, denoiser: ModelDenoiser, prompts: list[list[int]], recipe: Recipe
) -> None:
    """Tokens of a step's rollouts per second."""
    rows = recipe.train.prompts_per_step * recipe.train.group_size
    each = [prompts[i % len(prompts)] for i in range(rows)]
    seconds, rollout = timed(lambda: sampled(engine, denoiser, each, recipe))
    tokens = int(rollout.action_mask.sum())
    say(f"{rows} rollouts, seconds", seconds)
    say("tokens per second", tokens / seconds)
    say("tokens per call", tokens / max(1, int(rollout.nfe.sum())))


def together(
    engine: Sglang, denoiser: ModelDenoiser, prompts: list[list[int]], recipe: Recipe
) -> None:
    """Greedy rows one by one and at once: another answer is a build that mixes requests."""
    at_once = sampled(engine, denoiser, prompts, recipe, greedy=True).completions()
    alone = [
        sampled(engine, denoiser, [prompt], recipe, greedy=True).completions()[0]
        for prompt in prompts
    ]
    same = sum(one == other for one, other in zip(at_once, alone, strict=True))
    say("greedy rows that are the same alone and at once", f"{same} of {len(prompts)}")


def sampled(
    engine: Sglang,
    denoiser: ModelDenoiser,
    prompts: list[list[int]],
    recipe: Recipe,
    *,
    greedy: bool = False,
) -> Rollout:
    d = recipe.decode
    canvas = blank_canvas(
        prompts, gen_length=d.gen_length, denoiser=denoiser, device=denoiser.device
    )
    settings = settings_at(d, d.temperature)
    if greedy:
        settings = replace(settings, temperature=0.0)
    return engine.sample(canvas, settings, named_generator(0, "served"), d.gamma)


def timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def say(what: str, value: Any) -> None:
    sys.stdout.write(f"{what}: {f'{value:.3g}' if isinstance(value, float) else value}\n")


def main(words: Sequence[str]) -> int:
    """0 if a run could go on."""
    if not words:
        sys.stdout.write(f"{__doc__}\n")
        return 2
    try:
        look(*load_method(words[0], ["rollouts.name=sglang", *words[1:]]))
    except (ValueError, OSError) as error:
        sys.stdout.write(f"cannot be used: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
