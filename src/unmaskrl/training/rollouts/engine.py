"""The engine of a run: the one that the recipe names, on the run's own weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ...core.decoding import Gamma
from ...core.rollouts import DecodeSettings, LocalRollouts, Rollouts
from ...core.types import Canvas, Rollout
from ...models.denoiser import ModelDenoiser
from ...recipes.engines import make_rollouts, refuse_unserved
from ...recipes.registry import Method
from ...recipes.schema import Recipe
from ...utils.torch_setup import DTYPES


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


def start_engine(recipe: Recipe, method: Method, policy: ModelDenoiser) -> Rollouts:
    """The recipe's engine for ``policy``, the weights that passes without gradient use: the run's
    own, a whole copy gathered from shards, or shards in lock-step.

    They are current inside ``Run.inference``, where every rollout is made. ValueError if the
    engine does not serve what the recipe needs.
    """
    wanted = recipe.model.rollout_dtype
    if wanted not in (None, recipe.model.dtype):
        return Converted(policy, DTYPES[wanted])
    engine = make_rollouts(recipe.rollouts, policy)
    refuse_unserved(recipe, method, engine)
    return engine
