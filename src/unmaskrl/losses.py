"""Policy losses: pure functions of token log-probs and a TrainBatch.

Means are sums over local tokens (rows) divided by a *global* count, so that micro-batches and ranks add up. Log-ratios
are clamped before exp; everything is fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .types import LossOutputs, TrainBatch

PolicyLoss = Callable[[Tensor, TrainBatch], LossOutputs]
_MAX_LOG_RATIO = 20.0


def token_clip(*, clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.04) -> PolicyLoss:
    """GRPO with one ratio per token (arXiv 2402.03300; STP and d1 use it on surrogates).

    loss = sum_i [ -min(w_i A, clip(w_i, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3_i ] / num_actions, over action tokens,
    w_i = exp(l_i - l_old_i), k3_i = exp(d) - d - 1 with d = l_ref_i - l_i.
    """
    _check_clip(clip_low, clip_high, kl_coef)

    def loss(token_logps: Float[Tensor, "B L"], batch: TrainBatch) -> LossOutputs:
        mask = batch.action_mask
        log_ratio = _log_ratio(token_logps, batch.old_logps)
        gain, clipped = _clipped_gain(log_ratio.exp(), batch.advantages[:, None], clip_low, clip_high)
        kl = _k3(token_logps, batch.ref_logps)
        total = ((kl_coef * kl - gain) * mask).sum() / batch.num_actions
        return LossOutputs(loss=total, metrics=_metrics(log_ratio, clipped, kl, mask, batch.num_actions))

    return loss


def sequence_clip(*, clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.04) -> PolicyLoss:
    """GRPO with one length-normalised ratio per row (GSPO, arXiv 2507.18071; STP's sequence-level variant).

    w = exp( (1/f) sum_i (l_i - l_old_i) ), f = action tokens of the row; loss = mean over rows with actions of the clipped
    gain, plus kl_coef times the token-mean k3.
    """
    _check_clip(clip_low, clip_high, kl_coef)

    def loss(token_logps: Float[Tensor, "B L"], batch: TrainBatch) -> LossOutputs:
        mask = batch.action_mask
        length = mask.sum(-1)
        difference = ((token_logps - batch.old_logps) * mask).sum(-1) / length.clamp(min=1)
        log_ratio = difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        gain, clipped = _clipped_gain(log_ratio.exp(), batch.advantages, clip_low, clip_high)
        kl = _k3(token_logps, batch.ref_logps)
        rows = length > 0
        total = -(gain * rows).sum() / batch.num_rows + kl_coef * (kl * mask).sum() / batch.num_actions
        metrics = _metrics(log_ratio, clipped, kl.sum(-1) * 0, rows, batch.num_rows)
        metrics["kl/ref"] = (kl * mask).sum().detach() / batch.num_actions
        return LossOutputs(loss=total, metrics=metrics)

    return loss


def _clipped_gain(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(w A, clip(w) A), and where the clip is what counts."""
    plain, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(plain, clipped), clipped < plain


def _log_ratio(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _k3(new: Tensor, ref: Tensor | None) -> Tensor:
    if ref is None:
        return torch.zeros_like(new)
    difference = _log_ratio(ref, new)
    return difference.exp() - difference - 1


def _metrics(log_ratio: Tensor, clipped: Tensor, kl: Tensor, mask: Tensor, count: float) -> dict[str, Tensor]:
    """Sums over local items divided by the global count (``ratio/max_dev`` is a maximum)."""
    with torch.no_grad():
        ratio = log_ratio.exp()
        return {
            "ratio/mean": (ratio * mask).sum() / count,
            "ratio/clip_frac": (clipped & mask).sum() / count,
            "ratio/max_dev": pad(((ratio - 1).abs() * mask).flatten(), (0, 1)).max(),  # 0 if there is nothing
            "kl/old": ((-log_ratio).exp() - 1 + log_ratio).mul(mask).sum() / count,
            "kl/ref": (kl * mask).sum() / count,
        }


def _check_clip(clip_low: float, clip_high: float, kl_coef: float) -> None:
    if not 0 <= clip_low < 1 or clip_high < 0:
        raise ValueError(f"need 0 <= clip_low < 1 and clip_high >= 0, got {clip_low} and {clip_high}")
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")


LOSSES = {"token_clip": token_clip, "sequence_clip": sequence_clip}
