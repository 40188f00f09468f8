"""What a recipe costs per step, counted without a model: denoiser calls and memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.decoding import planned_calls, whole_blocks
from ..core.decoding.sample import CHUNK_ELEMENTS
from ..models.adapter_folder import base_of
from ..models.families import (
    Family,
    FamilyConfig,
    MaskPredictor,
    known_config,
    named_family,
    parse_config,
)
from ..models.hub import asset, checkpoint_folder
from ..utils.files import json_text, read_json
from .registry import Method, build_method
from .schema import AUTO, ModelConfig, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Row-calls of one step (a call of B rows counts B) and bytes of the largest block of logits.

    A step is one batch of rollouts and ``num_iterations`` updates; the old policy is not run for
    the first of them.
    """

    num_iterations: int
    rollout_per_row: int
    rollout: int
    old: int
    ref: int
    new: int
    logits_bytes: int
    full_logits_bytes: int
    parameters: int

    def per_update(self, calls: int) -> float:
        """A step's calls over its updates."""
        return calls / self.num_iterations

    @property
    def forwards(self) -> int:
        """Forward passes in rows, a backward pass counted as two."""
        return self.rollout + self.old + self.ref + 3 * self.new


def step_cost(recipe: Recipe, method: Method | None = None) -> Cost:
    """Upper bounds per step: no EOS, no flat group, anchors of the first step spread evenly over
    the completion.

    Canvases that a group shares are counted once, as they are run.
    """
    method = method or build_method(recipe)
    t = recipe.train
    d = recipe.decode
    rows = t.prompts_per_step * t.group_size
    anchored = recipe.prior.share if recipe.prior.name == "anchors" else 0.0
    # adaptive rules: one token per call at worst
    steps = d.steps if method.rule.prefix is None else d.gen_length
    estimator = method.estimator
    loss = method.loss
    grid = model_grid(recipe.model)
    blank, given = (
        max(
            planned_calls(open_blocks(recipe, keep, shared), d.gen_length, steps, d.exit_at, grid)
            for shared in range(grid or 1)
        )
        for keep in (0.0, recipe.prior.keep)
    )
    # at worst every group is wrong, and decoded again
    first = blank if recipe.prior.when == "all_wrong" else (1 - anchored) * blank
    calls = first + anchored * given
    # what a trajectory has: a block-causal one, the calls of a block
    latents = (
        blank
        if grid is None
        else max(planned_calls([n], d.gen_length, steps, d.exit_at) for n in range(1, grid + 1))
    )
    views = estimator.num_views(d.gen_length, latents, d.exit_at is not None and d.exit_at < 1)
    # the rollouts of a group share a canvas where nothing of the answer is seen
    shares = recipe.prior.name == "none" and grid is None
    shared = estimator.num_shared if shares else 0
    scored = rows * (views - shared) + t.prompts_per_step * shared
    vocab, parameters = model_size(recipe.model)
    targets = rows * views if t.max_canvases == AUTO else min(t.max_canvases, rows * views)
    return Cost(
        num_iterations=t.num_iterations,
        rollout_per_row=round(calls),
        rollout=round(rows * calls),
        old=scored * (t.num_iterations - 1) if loss.uses_old else 0,
        ref=scored * t.num_iterations if loss.uses_ref else 0,
        new=scored * t.num_iterations,
        logits_bytes=4 * min(CHUNK_ELEMENTS, targets * d.gen_length * vocab),
        full_logits_bytes=4 * targets * d.gen_length * vocab,
        parameters=parameters,
    )


def open_blocks(recipe: Recipe, keep: float, shared: int = 0) -> list[int]:
    """Open tokens per block when a share ``keep`` of the completion is anchored, spread evenly.

    The first block of a block-causal row holds ``shared`` tokens of the prompt as well, and the
    last one is decoded whole.
    """
    d = recipe.decode
    sizes = whole_blocks(d.gen_length, d.block_length, shared)
    blocks = len(sizes)
    fixed = int(keep * d.gen_length + 0.5)
    return [
        max(0, size - (fixed * (b + 1) // blocks - fixed * b // blocks))
        for b, size in enumerate(sizes)
    ]


def model_size(model: ModelConfig) -> tuple[int, int]:
    """Width of the logits and number of parameters, from config.json alone."""
    config, family = described_model(model)
    return config.embedding_size, count_parameters(empty_module(config, family))


def model_grid(model: ModelConfig) -> int | None:
    """Block length of a block-causal model, from config.json alone; None for full attention.

    As its config says, without a module: one of many experts takes seconds to build.
    """
    return getattr(described_model(model)[0], "block_length", None)


def empty_module(config: FamilyConfig, family: Family) -> MaskPredictor:
    """A module without memory, to be counted and not changed: one of many experts takes seconds to
    build, empty as it is, and the last two are kept.
    """
    return _built(family.read, family.build, json_text(config.to_dict()))


@functools.lru_cache(maxsize=2)
def _built(read: Callable, build: Callable, config: str) -> MaskPredictor:
    return build(read(json.loads(config)))


def described_model(model: ModelConfig) -> tuple[FamilyConfig, Family]:
    """Config and family of a recipe's model, from config.json alone; ValueError if there is
    none.
    """
    family = named_family(model.family)
    raw = model_config(model.path, family)
    return parse_config(raw, f"model.path {model.path}", family, model.given, model.path)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(p.numel() for p in module.parameters())


def model_config(path: str, family: Family | None = None) -> dict[str, Any]:
    """A checkpoint's config.json: from its folder, by heart for released models, else fetched
    alone. ValueError if none.
    """
    known = None if Path(asset(path)).is_dir() else known_config(path, family)
    if known is not None:
        return known
    folder = checkpoint_folder(asset(path), patterns=("config.json",))
    base = base_of(folder)
    if base is not None:
        return model_config(base.path, family)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model.path {path}: there is no {folder / 'config.json'}; give a checkpoint folder or "
            "a shipped name"
        )
    return read_json(folder / "config.json")
