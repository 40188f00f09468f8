"""Training the threshold head inside the RL loop: what it drew, what that was worth, its
own optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...core.advantages import group_mean
from ...core.rng import counter_uniform, named_generator, named_seed
from ...core.threshold_head import ThresholdHead, prompt_features, speed_reward, threshold_loss
from ...core.types import Rollout
from ...models.denoiser import ModelDenoiser
from ...models.heads import load_threshold
from ...recipes.registry import selection_rule
from ...recipes.schema import Recipe, SamplerConfig
from .problems import Rewarded


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the head saw and drew for each of the N rows of a step that made a call, how likely that
    was, and its advantage.
    """

    features: Tensor  # (N, D)
    index: Tensor  # (N,)
    old_logps: Tensor  # (N,)
    advantages: Tensor  # (N,)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(slots=True, kw_only=True)
class Sampler:
    """The head, its optimiser, and the draws of the rollouts in progress."""

    config: SamplerConfig
    head: ThresholdHead
    optimizer: torch.optim.Optimizer
    drawn: dict[str, Tensor]

    @classmethod
    def start(cls, recipe: Recipe, denoiser: ModelDenoiser, folder: Path | None) -> Sampler | None:
        """The head beside the model, or a new one where it is trained; None where gamma is a number
        or there is none.
        """
        if selection_rule(recipe.decode.select).prefix is None or recipe.decode.gamma is not None:
            return None
        t = recipe.sampler
        head = None if folder is None else load_threshold(folder, denoiser.device)
        if head is None and t.mode == "policy":
            raise ValueError(
                "decode.gamma is null, so a threshold head chooses it, but "
                f"{folder or recipe.model.path} has none: "
                "set decode.gamma=0.1, or train a head with sampler.mode=joint or sampler"
            )
        if head is None:
            config: Any = denoiser.model.config
            sizes = {"start": t.start, "width": t.width, "floor": t.floor}
            head = ThresholdHead(config.d_model, t.gammas, **sizes)
            head = head.init_weights(named_generator(recipe.run.seed, "threshold")).to(
                denoiser.device
            )
        head.requires_grad_(True)
        return cls(
            config=t,
            head=head,
            optimizer=torch.optim.AdamW(head.parameters(), lr=t.lr, weight_decay=0.0),
            drawn={},
        )

    def trains(self, share_done: float) -> bool:
        """Whether the head learns at this point of the run."""
        mode = self.config.mode
        return mode in ("sampler", "joint") or (
            mode == "sequential" and share_done >= self.config.switch_at
        )

    def gamma(
        self, prompt_mask: Tensor, row_ids: Tensor, seed: int, step: int
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """``gamma`` for ``decode``: one draw per rollout, keyed by its row id, and remembered."""
        count = len(row_ids)
        device = row_ids.device
        self.drawn = {
            "features": torch.zeros(count, self.head.d_model, device=device),
            "index": torch.zeros(count, dtype=torch.int64, device=device),
            "old_logps": torch.zeros(count, device=device),
        }

        def draw(hidden: Tensor, rows: Tensor) -> Tensor:
            features = prompt_features(hidden, prompt_mask[rows])
            uniform = counter_uniform(named_seed(seed, "gamma", step), row_ids[rows])
            index, logps = self.head.act(features, uniform)
            for name, value in (("features", features), ("index", index), ("old_logps", logps)):
                self.drawn[name][rows] = value
            # decode refuses NaN
            return torch.where(logps.isnan(), math.nan, self.head.gammas(index))

        return draw

    def choices(self, done: Rewarded) -> Choices:
        """The step's draws with their advantages: task reward less the cost of calls, against the
        mean of the group's draws.

        Rows that made no call (nothing was open) drew no gamma: the head learns nothing from them.
        """
        rollout = done.rollout
        drew = rollout.nfe > 0
        chosen = drew.cpu()
        reward = speed_reward(
            done.rewards[chosen],
            done.correct[chosen],
            rollout.nfe.cpu()[chosen],
            alpha=self.config.alpha,
            max_calls=rollout.asked.stop - rollout.asked.start,
        )
        advantages = group_mean(reward, rollout.group_ids.cpu()[chosen]).to(rollout.ids.device)
        return Choices(
            **{name: value[drew] for name, value in self.drawn.items()}, advantages=advantages
        )

    def backward(self, choices: Choices, num_rows: float) -> dict[str, Tensor]:
        """This rank's clipped policy gradient of the head alone, and metrics that add up over
        ranks.
        """
        self.optimizer.zero_grad(set_to_none=True)
        c = self.config
        loss, metrics = threshold_loss(
            self.head,
            choices.features,
            choices.index,
            choices.old_logps,
            choices.advantages,
            clip=c.clip,
            entropy_coef=c.entropy_coef,
            num_rows=num_rows,
        )
        loss.backward()
        return {**metrics, "sampler/loss": loss.detach()}


def num_blocks(rollout: Rollout, block_length: int) -> Int[Tensor, " B"]:
    """Blocks of each row's completion; a block-causal row counts them from its own first token, so
    that its prompt and its completion may share one.
    """
    prompt = rollout.prompt_mask.sum(-1)
    start = prompt // block_length * block_length if rollout.block_length else prompt
    return -(-(rollout.attention_mask.sum(-1) - start) // block_length)


def sampler_metrics(rollout: Rollout, block_length: int) -> dict[str, float]:
    """Mean log10 gamma of positive choices, share of exact ones, and the share of rows that took
    the fewest calls possible.

    ``sampler/fewest_calls`` near 1 is the collapse to one call per block. Rows that made no call
    chose nothing: left out.
    """
    drew = rollout.nfe > 0
    gamma = rollout.gamma[drew]
    nfe = rollout.nfe[drew]
    positive = gamma[gamma > 0]
    blocks = num_blocks(rollout, block_length)[drew]
    count = max(1, len(nfe))
    return {
        "sampler/log10_gamma": float(positive.log10().mean()) if len(positive) else 0.0,
        "sampler/exact_share": float((gamma == 0).double().sum() / count),
        "sampler/fewest_calls": float((nfe <= blocks).double().sum() / count),
    }
