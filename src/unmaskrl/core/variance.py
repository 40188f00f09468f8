"""How much the likelihood estimate of a finished completion varies over the masks it is made from
(what figure 3 of STP, arXiv 2602.08905, compares; there over completions that differ).

The same completions are scored three times, so that nothing but the pruning differs:

    full        every completion token is an action token: as if it had been decoded freely (c
        tokens)
    free        anchors are given, the f free tokens are scored, none by an exit term
    free+exit   the rollout as it is: tokens of the exit call are scored once, in one view of their
        own

A row's estimate is the total over its action tokens, in nats; its variance over R draws is in
nats^2. Per action token, the denominator has to be said: f^2 (f free tokens of that version: the
mean over what is scored) or c^2 (c completion tokens, the same for all versions). The versions have
different targets: "full" also explains the anchors, and "free+exit" is the bound of the pruned
process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from .denoiser import Denoiser
from .estimators.base import Estimator, Update
from .precision import finest
from .rng import draw_seed, named_generator
from .scoring import frozen_token_logps
from .types import Rollout, Views

VERSIONS = ("full", "free", "free+exit")
ROUNDING = 1e-9  # nats^2; below this a variance is that of fp32 sums in another order
MEASURES = ("variance", "per_free", "per_token")
_CLEAR = 0.975  # of the resampled draws; by chance alone 2.5% of the rows get there on either side


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """R estimates (nats) of each row's log-likelihood, the row's denominators, and canvases per row
    and draw.
    """

    totals: Float64[Tensor, "B R"]
    num_free: Int[Tensor, " B"]
    num_tokens: Int[Tensor, " B"]
    canvases: float

    @property
    def variance(self) -> Float64[Tensor, " B"]:
        """Unbiased variance of the total over the draws, nats^2."""
        return self.totals.var(1)

    @property
    def per_free(self) -> Float64[Tensor, " B"]:
        """Variance / f^2: of the mean over the version's action tokens; 0 for a row without any."""
        return self.variance / self.num_free.clamp(min=1) ** 2

    @property
    def per_token(self) -> Float64[Tensor, " B"]:
        """Variance / c^2: the total's variance over one denominator for all versions."""
        return self.variance / self.num_tokens.clamp(min=1) ** 2


def rollout_version(rollout: Rollout, version: str) -> Rollout:
    """The same completions as if they had been decoded otherwise (see the module); ``rollout``
    itself stays as it is.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}; got {version!r}")
    if version == "free+exit":
        return rollout
    steps = rollout.decoded_step
    no_exit = torch.zeros_like(rollout.exit_step)
    if version == "free":
        return replace(rollout, exit_step=no_exit, block_exits=None)
    steps = torch.where(rollout.anchor_mask, 1, steps)
    return replace(
        rollout,
        decoded_step=steps,
        exit_step=no_exit,
        block_exits=None,
        nfe=rollout.nfe.clamp(min=1),
    )


def draw_totals(
    denoiser: Denoiser,
    rollout: Rollout,
    estimator: Estimator,
    *,
    num_draws: int,
    generator: torch.Generator,
    max_canvases: int = 4096,
    on_draws: Callable[[int], None] | None = None,
) -> Draws:
    """``num_draws`` independent estimates per row, without gradient, at most ``max_canvases``
    canvases per denoiser call.

    Several draws are scored as copies of the batch, so canvases that they share (the exit's, say)
    are run once. Masks are keyed by row id: a row's estimates do not depend on the batch or on
    ``max_canvases``. ``on_draws``: draws just finished.
    """
    if num_draws < 2:
        raise ValueError(f"a variance needs at least 2 draws, got {num_draws}")
    totals = []
    pending = []
    scored = 0
    for _ in range(num_draws):
        # estimators that share a draw over inner updates draw it anew
        update = Update(seed=draw_seed(generator))
        views = estimator.make_views(rollout, denoiser.mask_id, generator, update)
        pending.append(views)
        scored += int((views.weight != 0).any(-1).sum())
        full = (len(pending) + 1) * views.ids.shape[0] * views.ids.shape[1] > max_canvases
        if full or len(totals) + len(pending) == num_draws:
            copies = rollout.rows(
                torch.arange(len(rollout.ids), device=rollout.ids.device).repeat(len(pending))
            )
            logps = frozen_token_logps(
                denoiser, copies, estimator, _stacked(pending), max_canvases=max_canvases
            )
            totals += finest(logps).sum(-1).reshape(len(pending), -1).cpu().unbind(0)
            if on_draws:
                on_draws(len(pending))
            pending = []
    return Draws(
        totals=torch.stack(totals, 1),
        num_free=rollout.action_mask.sum(-1).cpu(),
        num_tokens=rollout.completion_mask.sum(-1).cpu(),
        canvases=scored / (num_draws * max(1, len(rollout.ids))),
    )


def compare_versions(
    denoiser: Denoiser,
    rollout: Rollout,
    estimator: Estimator,
    *,
    num_draws: int,
    generator: torch.Generator,
    max_canvases: int = 4096,
    on_draws: Callable[[int], None] | None = None,
) -> dict[str, Draws]:
    """``draw_totals`` of the three versions, from the same seed: draws are independent, versions
    are paired. ValueError where "full" would score anchors among ids that they were drawn from.
    """
    of_draws = estimator.probability_of is not None and rollout.is_truncated
    if of_draws and bool((rollout.anchor_mask & rollout.completion_mask).any()):
        raise ValueError(
            "the estimator: it scores what was drawn among what it was drawn from (top_k, top_p), "
            "and without pruning it would score anchors, which were given; leave out top_k and "
            "top_p, or use an estimator of the policy itself (elbo, espo, coupled)"
        )
    seed = draw_seed(generator)
    return {
        version: draw_totals(
            denoiser,
            rollout_version(rollout, version),
            estimator,
            num_draws=num_draws,
            generator=torch.Generator().manual_seed(seed),
            max_canvases=max_canvases,
            on_draws=on_draws,
        )
        for version in VERSIONS
    }


def ratio_of_means(
    above: Float64[Tensor, " B"],
    below: Float64[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    generator: torch.Generator,
    num_resamples: int = 2000,
) -> Interval | None:
    """mean(above) / mean(below) over rows with a percentile bootstrap over groups; None where
    ``below`` is 0 (no variance).
    """
    if float(below.mean()) <= ROUNDING:
        return None
    _, group = group_ids.cpu().unique(return_inverse=True)
    num_groups = int(group.max()) + 1
    sums = torch.zeros(num_groups, 2, dtype=torch.float64).index_add(
        0, group, torch.stack([above, below], 1)
    )
    picked = torch.randint(num_groups, (num_resamples, num_groups), generator=generator)
    resampled = sums[picked].sum(1)
    resampled = resampled[resampled[:, 1] > 0]
    quantiles = (resampled[:, 0] / resampled[:, 1]).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    )
    return Interval(float(above.mean() / below.mean()), float(quantiles[0]), float(quantiles[1]))


def rising_rows(
    before: Draws, after: Draws, generator: torch.Generator, num_resamples: int = 400
) -> tuple[Float64[Tensor, " B"], Float64[Tensor, " B"]]:
    """Per row: 1 if its variance is higher ``after`` than ``before``, and the share of resampled
    draws in which it is.

    Draws are resampled in pairs: the masks of the two versions come from the same uniforms.
    """
    num_draws = before.totals.shape[1]
    picked = torch.randint(num_draws, (num_resamples, num_draws), generator=generator)
    ones = torch.ones(picked.shape, dtype=torch.float64)
    counts = torch.zeros_like(ones).scatter_add(1, picked, ones)

    def variances(draws: Draws) -> Tensor:
        centred = draws.totals - draws.totals.mean(1, keepdim=True)
        mean = centred @ counts.T / num_draws
        square = centred**2 @ counts.T / num_draws
        return (square - mean**2).clamp(min=0)

    rises = (after.variance > before.variance + ROUNDING).double()
    return rises, (variances(after) > variances(before) + ROUNDING).double().mean(1)


def step_metrics(
    denoiser: Denoiser,
    rollout: Rollout,
    estimator: Estimator,
    *,
    num_draws: int,
    generator: torch.Generator,
    max_canvases: int,
) -> dict[str, float | None]:
    """Means over rows with action tokens: variance of the total (nats^2) and variance / f^2; for
    the log of a run.
    """
    draws = draw_totals(
        denoiser,
        rollout,
        estimator,
        num_draws=num_draws,
        generator=generator,
        max_canvases=max_canvases,
    )
    live = draws.num_free > 0
    mean = {
        "likelihood/variance": draws.variance[live],
        "likelihood/variance_per_token": draws.per_free[live],
    }
    return {key: float(values.mean()) if len(values) else None for key, values in mean.items()}


def _stacked(draws: list[Views]) -> Views:
    """Several draws as one batch of rows."""
    upper = [views.upper for views in draws if views.upper is not None]
    return Views(
        ids=torch.cat([views.ids for views in draws]),
        weight=torch.cat([views.weight for views in draws]),
        upper=torch.cat(upper) if upper else None,
    )


def summarise(name: str, draws: dict[str, Draws], group_ids: Tensor, seed: int) -> dict[str, Any]:
    """One estimator: per version means over rows, ratios to "full" with 95% intervals, shares of
    rows that rose, rows.
    """
    full = draws["full"]
    versions = {}
    for version, d in draws.items():
        versions[version] = {
            "canvases": d.canvases,
            "mean": float(d.totals.mean()),
            **{measure: float(getattr(d, measure).mean()) for measure in MEASURES},
            "rows": [float(f"{v:.5g}") for v in d.variance.tolist()],
            "free": d.num_free.tolist(),
        }
        if version == "full":
            continue
        generator = named_generator(seed, "bootstrap", name, version)
        ratios = {
            m: ratio_of_means(getattr(d, m), getattr(full, m), group_ids, generator)
            for m in MEASURES
        }
        rises, share = rising_rows(full, d, generator)
        versions[version] |= {
            "ratio": ratios,
            "rose": float(rises.mean()),
            "rose_clearly": float((share >= _CLEAR).double().mean()),
            "fell_clearly": float((rising_rows(d, full, generator)[1] >= _CLEAR).double().mean()),
        }
    return {"name": name, "versions": versions}


def rollout_figures(rollout: Rollout, correct: Sequence[bool]) -> dict[str, float]:
    """Means over rows of what was rolled out: tokens up to EOS, anchors and exit tokens among them,
    correctness.
    """
    masks = {
        "tokens": rollout.completion_mask,
        "anchors": rollout.anchor_mask & rollout.completion_mask,
        "exit_tokens": rollout.exit_mask,
    }
    lengths = {key: float(mask.sum(-1).double().mean()) for key, mask in masks.items()}
    return {**lengths, "accuracy": sum(correct) / len(correct)}
