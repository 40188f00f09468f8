"""The engine of a run: the one that the recipe names, on the run's own weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ...core.decoding import Gamma
from ...core.rollouts import DecodeSettings, LocalRollouts, Rollouts
from ...core.types import Canvas, Rollout
from ...models.adapters import adapters_merged
from ...models.denoiser import ModelDenoiser
from ...recipes.engines import NOT_IN_LOCKSTEP, make_rollouts, refuse_unserved
from ...recipes.registry import Method
from ...recipes.schema import Recipe
from ...utils.torch_setup import DTYPES
from ..ranks.shard import Lockstep


class Converted(LocalRollouts):
    """The local engine in another precision: every batch of rollouts on a copy of the current
    weights, which lives no longer (``model.rollout_dtype``).
    """

    denoiser: ModelDenoiser

    def __init__(self, denoiser: ModelDenoiser, dtype: torch.dtype) -> None:
        super().__init__(denoiser)
        self.dtype = dtype

    def sample(
        self,
        canvas: Canvas,
        settings: DecodeSettings,
        generator: torch.Generator | None = None,
        gamma: Gamma | None = None,
    ) -> Rollout:
        """``decode`` by a converted copy."""
        model = copy.deepcopy(self.denoiser.model).to(self.dtype)
        converted = LocalRollouts(replace(self.denoiser, model=model))
        return converted.sample(canvas, settings, generator, gamma)


class Merged(LocalRollouts):
    """The local engine on weights with the adapters added in, for each batch of rollouts
    (``model.lora.merge_rollout``): the same weights whenever it is asked, from W, A and B alone.
    """

    denoiser: ModelDenoiser

    def sample(
        self,
        canvas: Canvas,
        settings: DecodeSettings,
        generator: torch.Generator | None = None,
        gamma: Gamma | None = None,
    ) -> Rollout:
        """``decode`` without products by A and B."""
        with adapters_merged(self.denoiser.model):
            return super().sample(canvas, settings, generator, gamma)


def start_engine(recipe: Recipe, method: Method, policy: ModelDenoiser) -> Rollouts:
    """The recipe's engine for ``policy``, the weights that passes without gradient use: the run's
    own, a whole copy gathered from shards, or shards in lock-step.

    They are current inside ``Run.inference``, where every rollout is made. ValueError if the
    engine does not serve what the recipe needs.
    """
    wanted = recipe.model.rollout_dtype
    if wanted not in (None, recipe.model.dtype):
        return Converted(policy, DTYPES[wanted])
    if recipe.model.lora and recipe.model.lora.merge_rollout:
        if isinstance(policy, Lockstep):  # accelerate's own settings may have asked for it
            raise ValueError(NOT_IN_LOCKSTEP)
        return Merged(policy)
    engine = make_rollouts(recipe.rollouts, policy)
    refuse_unserved(recipe, method, engine)
    return engine
