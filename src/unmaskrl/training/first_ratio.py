"""Before anything is updated, every ratio must be 1: the check that scoring with gradient is
scoring without.
"""

from __future__ import annotations

import math

from ..core.scoring import count_canvases, frozen_token_logps, live_token_logps
from ..core.types import Views
from .memory_notes import with_fewer_canvases
from .rollouts.open_step import Batch
from .state import Run

# Of the clip range: how far a log-ratio that should be 0 may be off. Rounding in low precision is
# worth far more.
SHARE = {"float32": 0.02, "float64": 0.02, "bfloat16": 0.5}
UNCLIPPED = math.log(1.2)  # nats: stands in for the range of a loss that has none


def check_first_ratio(run: Run, batch: Batch, views: Views) -> dict[str, float]:
    """The largest |log-ratio| (nats) of the two scoring passes over all ranks:
    ``health/first_log_ratio``.

    Raises ValueError, on every rank, where it is more than a share of the loss's clip range: ratios
    would then be clipped, or not, for their rounding errors. A part of a run that was resumed is
    checked, but its log is that of the run made in one go.
    """
    if run.sharded:  # a pass with gradient needs the other ranks
        return {}
    worst = run.most(largest_difference(run, batch, views))
    check_range(worst, run.method.loss.clip_range, run.recipe.model.dtype)
    return {"health/first_log_ratio": worst} if run.step == 0 else {}


def largest_difference(run: Run, batch: Batch, views: Views) -> float:
    """max |log p with gradient - log p without| over this rank's tokens, in nats; 0 without
    rows.
    """
    if not len(batch.rollout.ids):
        return 0.0
    args = (batch.rollout, run.method.estimator, views)

    def difference(limit: int) -> float:
        before = frozen_token_logps(run.frozen, *args, max_canvases=limit)
        live = live_token_logps(run.denoiser, *args, max_canvases=limit)
        return float((live - before).abs().max())

    return with_fewer_canvases(run, count_canvases(batch.rollout, views), difference)


def check_range(worst: float, clip_range: float, dtype: str) -> None:
    """Refuse a log-ratio (nats) that is not 0 within its share of the clip range; NaN is not 0."""
    allowed = SHARE[dtype] * (clip_range if math.isfinite(clip_range) else UNCLIPPED)
    if not worst <= allowed:
        raise ValueError(
            "ratio is not 1 before the first update: a token's log-probability with gradient and "
            "without "
            f"differ by {worst:.2e} nats, and {allowed:.2e} are allowed in {dtype} for this clip "
            "range; "
            "set model.dtype=float32, or widen loss.clip_low and loss.clip_high"
        )
