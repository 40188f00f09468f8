"""How noisy a GRPO log-ratio is after 0, 1, 2, 3 updates: real sudoku rollouts of ``mini``, real
optimiser steps.

One batch is rolled out with anchors and an exit; its completions, the old policy and the updated
ones are then scored with many independent draws of masks. Every likelihood looks at the same
completions and the same weights: what differs is what is scored.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.estimators import elbo
from unmaskrl.core.rng import named_generator
from unmaskrl.core.scoring import frozen_token_logps
from unmaskrl.core.types import Rollout
from unmaskrl.models.weights import frozen_copy
from unmaskrl.recipes.load import load_recipe
from unmaskrl.training.loop import collect, update
from unmaskrl.training.setup import start_run

SETTINGS = (
    "prior.keep=0.2 prior.keep_end=null prior.share=1.0 estimator.hide_anchors=false "
    "decode.exit_at=0.85 "
    "train.prompts_per_step=8 train.group_size=8 optimizer.warmup=0 optimizer.schedule=constant "
    "run.log_with=[] run.threads=1"
).split()
ROWS = 16
DRAWS = 24
UPDATES = 3
Figures = dict[str, Any]


def drift_figures() -> Figures:
    """One row per likelihood and number of updates (seed 0 of ``sudoku-mini`` with
    ``SETTINGS``).
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("sudoku-mini", [*SETTINGS, f"run.out={folder}/run"])
        run = start_run(recipe, resume=False, force=True)
        old = frozen_copy(run.denoiser)
        batch = collect(run)
        rows = []
        sample = batch.rollout.rows(torch.arange(ROWS) * (len(batch.advantages) // ROWS))
        before = {name: draws(old, rollout) for name, rollout in likelihoods(sample).items()}
        for done in range(UPDATES + 1):
            for name, rollout in likelihoods(sample).items():
                now = before[name] if done == 0 else draws(run.denoiser, rollout)
                rows.append(
                    {
                        "likelihood": name,
                        "updates": done,
                        **noise(now, before[name], rollout.action_mask),
                    }
                )
            if done < UPDATES:
                update(run, batch, check_ratio=done == 0)
                run.inner = run.inner + 1
                run.updates = run.updates + 1
        tokens = {
            name: float(r.action_mask.sum(-1).float().mean())
            for name, r in likelihoods(sample).items()
        }
        used = {
            "rows": ROWS,
            "draws": DRAWS,
            "lr": recipe.optimizer.lr,
            "settings": " ".join(SETTINGS),
        }
        return {
            **used,
            "tokens": tokens,
            "exit_tokens": float(sample.exit_mask.sum(-1).float().mean()),
            "table": rows,
        }


def likelihoods(rollout: Rollout) -> dict[str, Rollout]:
    """The same completions scored as four processes: anchors as tokens of the policy or given, exit
    call as such or not.
    """
    anchors_free = torch.where(rollout.anchor_mask, 1, rollout.decoded_step)
    no_exit = torch.zeros_like(rollout.exit_step)
    return {
        "all tokens": replace(rollout, decoded_step=anchors_free, exit_step=no_exit),
        "free tokens": replace(rollout, exit_step=no_exit),
        "all tokens, exit": replace(rollout, decoded_step=anchors_free),
        "free tokens, exit": rollout,
    }


def draws(denoiser: Denoiser, rollout: Rollout) -> Tensor:
    """Token log-probs (ROWS, DRAWS, L) of the shipped estimator; the same masks for every
    denoiser.
    """
    copies = rollout.rows(torch.arange(ROWS).repeat_interleave(DRAWS))
    copies = replace(copies, row_ids=torch.arange(ROWS * DRAWS))
    views = elbo(num_mc=3).make_views(copies, denoiser.mask_id, named_generator(0, "drift"))
    logps = frozen_token_logps(denoiser, copies, elbo(num_mc=3), views, max_canvases=512)
    return logps.reshape(ROWS, DRAWS, -1).double()


def noise(now: Tensor, before: Tensor, mask: Tensor) -> Figures:
    """Variance over masks of the log-ratio of each row, nats**2, masks shared by both policies or
    drawn for each.

    ``token``: of one token's log-ratio (what ``token_clip`` exponentiates), mean over tokens;
    ``mean``: of the mean over the row's tokens (``sequence_clip``); ``sum``: of their sum.
    ``inflation``: log E[w_hat] - log w of ``mean`` as measured with masks drawn for each (v / 2 if
    the noise were Gaussian). ``drift``: root mean square over rows of the mean log-ratio per token,
    nats.
    """
    length = mask.sum(-1).double()
    sums = [(x * mask[:, None]).sum(-1) for x in (now, before)]
    result: Figures = {}
    for name, (new, old) in {
        "token": (now, before),
        "mean": [x / length[:, None] for x in sums],
        "sum": sums,
    }.items():
        for kind, spread in (
            ("independent", new.var(1) + old.var(1)),
            ("shared", (new - old).var(1)),
        ):
            row = (spread * mask).sum(-1) / length if spread.ndim == 2 else spread
            result[f"{name} {kind}"] = [float(f"{v:.6g}") for v in row]
    shared, apart = ((sums[0] - sums[1].roll(k, 1)) / length[:, None] for k in (0, 1))
    inflation = apart.logsumexp(1) - math.log(apart.shape[1]) - apart.mean(1)
    return result | {
        "inflation": float(inflation.mean()),
        "drift": float(shared.mean(1).square().mean().sqrt()),
    }
