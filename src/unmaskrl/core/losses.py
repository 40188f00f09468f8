"""Policy losses: pure functions of token log-probs and a TrainBatch.

Every loss is  sum_b c_b * ( -gain_b + kl_coef * KL_b )  with gain and KL summed over a row's action
    tokens, and c_b the weight
of one of its tokens (``normaliser``), from *global* counts, so that micro-batches and ranks add up:

    token       1 / tokens of the step                          every token counts the same (DAPO,
        d1's code)
    sequence    1 / (tokens of the row * rows of the step)      every row counts the same (GRPO's
        1/|o|)
    group       1 / (tokens of the group * groups of the step)  every prompt counts the same
    calls       1 / (tokens of its call * calls of the row * rows of the step)
                every denoiser call of a row counts the same (CJ-GRPO, arXiv 2509.23924)
    rows        1 / rows of the step                            sums over tokens, mean over rows
    groups      1 / groups of the step                          sums over tokens and rows, mean over
        groups (wd1)

KL terms, per token, d = l_ref - l (``kl_to="ref"``; "old" puts the old policy in its place): ``k1``
= -d (its gradient is not the KL's: for monitoring), ``k2`` = d^2 / 2, ``k3`` = exp(d) - d - 1;
``quadratic`` = (sum_i d_i)^2 / 2 per row (ESPO's). Beyond 20 nats exp goes on along its tangent
(``bounded_exp``): finite values, and a gradient wherever the formula has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from .importance import truncated_weights, weight_sums
from .types import LossOutputs, TrainBatch

NORMALISERS = ("token", "sequence", "group", "calls", "rows", "groups")
KL_TO = ("ref", "old")
# (log-ratio (B, L), advantages (B,), mask) -> (gain, log-ratio, where the clip is what counts), all
# per token
Gain = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# batch -> (a factor per token or None, metrics)
Weigh = Callable[[TrainBatch], tuple[Tensor | None, dict[str, Tensor]]]
_MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """A loss and what it looks at; ``kl_coef`` 0 means that rows without advantage can be left out.

    ``clip_range``: how far, in nats, a log-ratio is from the nearer end of the clip range; infinite
    without a clip. ``takes_ratio``: it looks at the ratio to the old policy, which a bound or a
    weight on log-likelihoods does not give. ``uses_behavior``: it needs the probability that each
    token was drawn with. ``kl`` and ``kl_to`` say which KL term ``kl_coef`` weighs.
    """

    fn: Callable[[Tensor, TrainBatch], LossOutputs]
    uses_old: bool
    uses_ref: bool
    kl_coef: float
    clip_range: float = math.inf
    takes_ratio: bool = True
    uses_behavior: bool = False
    kl: str = "k3"
    kl_to: str = "ref"

    def __call__(self, token_logps: Tensor, batch: TrainBatch) -> LossOutputs:
        """The loss of these token log-probs."""
        return self.fn(token_logps, batch)


def token_clip(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.04,
    kl: str = "k3",
    kl_to: str = "ref",
    normaliser: str = "token",
    is_cap: float | None = None,
    is_normalise: bool = False,
) -> PolicyLoss:
    """GRPO with one ratio per token (arXiv 2402.03300; STP and d1 use it on surrogates).

    gain = sum_i v_i min(w_i A, clip(w_i, 1 - clip_low, 1 + clip_high) A), w_i = exp(l_i - l_old_i),
    v_i = 1, or with ``is_cap`` the truncated importance weight of ``importance.truncated_weights``
    (DiFFPO).
    """
    clip_range = _clip_range(clip_low, clip_high)
    if is_cap is not None and is_cap < 1:
        raise ValueError(
            "is_cap truncates importance weights, whose mean is 1: it must be at least 1, got "
            f"{is_cap}"
        )
    if is_normalise and is_cap is None:
        raise ValueError(
            "is_normalise normalises importance weights: got is_cap=null; set is_cap, for instance "
            "to 2"
        )

    def gain(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, clipped = _clipped_gain(
            bounded_exp(log_ratio), advantages[:, None], clip_low, clip_high
        )
        return value * mask, log_ratio, clipped

    def weigh(batch: TrainBatch) -> tuple[Tensor | None, dict[str, Tensor]]:
        if is_cap is None:
            return None, {}
        assert batch.behavior_logps is not None and batch.progress is not None, (
            "importance weights need the rollout's own"
        )
        mask = batch.action_mask
        weights = truncated_weights(
            batch.old_logps, batch.behavior_logps, mask, cap=is_cap, normalise=is_normalise
        )
        return weights, weight_sums(weights, mask, batch.progress, is_cap, batch.num_scored)

    made = _policy_loss(gain, kl_coef, kl, kl_to, normaliser, clip_range=clip_range, weigh=weigh)
    return made._replace(uses_behavior=is_cap is not None)


def sequence_clip(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.04,
    kl: str = "k3",
    kl_to: str = "ref",
    normaliser: str = "sequence",
    per_token: bool = True,
) -> PolicyLoss:
    """GRPO with one length-normalised ratio per row (GSPO, arXiv 2507.18071; ESPO; STP's
    sequence-level variant).

    gain = f * min(w A, clip(w) A), w = exp( (1/f) sum_i (l_i - l_old_i) ), f = action tokens of the
    row. ``per_token=False``: w = exp( sum_i (l_i - l_old_i) ), the ratio of the sequence itself
    (EBPO of LLaDA2.1, arXiv 2602.08676).
    """
    clip_range = _clip_range(clip_low, clip_high)

    def gain(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = _row_mean(log_ratio, mask) if per_token else (log_ratio * mask).sum(-1)
        value, clipped = _clipped_gain(bounded_exp(row), advantages, clip_low, clip_high)
        return (
            value[:, None] * mask,
            row[:, None].expand_as(mask),
            clipped[:, None].expand_as(mask),
        )

    return _policy_loss(gain, kl_coef, kl, kl_to, normaliser, clip_range=clip_range)


def reinforce(
    *, kl_coef: float = 0.0, kl: str = "k3", kl_to: str = "ref", normaliser: str = "token"
) -> PolicyLoss:
    """The likelihood weighted by the advantage, without ratio: gain = A sum_i l_i.

    REINFORCE and RLOO (advantage leave_one_out); SPG (estimator sandwich); wd1 (advantage
    softmax_weights, normaliser groups).
    """

    def gain(logps: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return advantages[:, None] * logps * mask, torch.zeros_like(logps), torch.zeros_like(mask)

    return _policy_loss(gain, kl_coef, kl, kl_to, normaliser, uses_ratio=False)


def linear_bound(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_to: str = "ref",
    normaliser: str = "sequence",
) -> PolicyLoss:
    """BGPO's lower bound of the sequence objective (arXiv 2510.11683; DARE's dllm_core_algos.py).

    delta = (1/f) sum_i (l_i - l_old_i);  w = 1 + delta where A >= 0 (below the ratio exp(delta)),
        exp(delta) where A < 0;
    gain = f * min(w A, clip(w) A), and where A < 0 at least dual_clip * A. The published code takes
        and clips w of every draw
    on its own and averages; here draws are averaged in delta: the same for num_mc=1, for A >= 0
        while no draw is clipped, and
    on the first update of a step. No logarithm is taken: nothing can be NaN.
    """
    clip_range = _clip_range(clip_low, clip_high)
    if dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")

    def gain(log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        delta = _row_mean(log_ratio, mask)
        ratio = torch.where(advantages >= 0, 1 + delta, bounded_exp(delta))
        value, clipped = _clipped_gain(ratio, advantages, clip_low, clip_high)
        floor = dual_clip * advantages
        clipped = clipped | ((advantages < 0) & (value < floor))
        value = torch.where(advantages < 0, torch.maximum(value, floor), value)
        return (
            value[:, None] * mask,
            delta[:, None].expand_as(mask),
            clipped[:, None].expand_as(mask),
        )

    return _policy_loss(gain, kl_coef, kl, kl_to, normaliser, clip_range=clip_range)


def token_weights(
    normaliser: str, mask: Bool[Tensor, "B L"], batch: TrainBatch
) -> Float[Tensor, " B"]:
    """c_b: the weight of one action token of each row, or of one call (see the module's table); 0
    for rows without any.
    """
    length = mask.sum(-1).to(batch.advantages.dtype)
    inverse = {
        "token": torch.full_like(length, batch.num_actions),
        "sequence": length * batch.num_rows,
        "group": batch.group_actions.to(length.dtype) * batch.num_groups,
        "rows": torch.full_like(length, batch.num_rows),
        "groups": torch.full_like(length, batch.num_groups),
    }
    if normaliser == "calls":
        inverse["calls"] = (_call_sizes(mask, batch) > 0).sum(-1) * batch.num_rows
    return (length > 0) / inverse[normaliser].clamp(min=1)


def _call_sizes(mask: Bool[Tensor, "B L"], batch: TrainBatch) -> Float[Tensor, "B N"]:
    """Action tokens that each denoiser call of a row revealed."""
    assert batch.calls is not None, "normaliser=calls needs the calls that revealed the tokens"
    most = int(batch.calls.max()) + 1 if batch.calls.numel() else 1
    sizes = batch.advantages.new_zeros((len(mask), most))
    return sizes.scatter_add(1, batch.calls, mask.to(sizes.dtype))


def _call_means(mask: Bool[Tensor, "B L"], batch: TrainBatch) -> Float[Tensor, "B L"]:
    """1 / (action tokens of each token's call)."""
    assert batch.calls is not None
    return 1 / _call_sizes(mask, batch).gather(1, batch.calls).clamp(min=1)


def _policy_loss(
    gain: Gain,
    kl_coef: float,
    kl: str,
    kl_to: str,
    normaliser: str,
    *,
    uses_ratio: bool = True,
    clip_range: float = math.inf,
    weigh: Weigh = lambda batch: (None, {}),
) -> PolicyLoss:
    for name, value, known in (
        ("kl", kl, _KL),
        ("kl_to", kl_to, KL_TO),
        ("normaliser", normaliser, NORMALISERS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if kl == "quadratic" and normaliser == "calls":
        raise ValueError("kl=quadratic is one term per row; normaliser=calls weighs tokens")
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")

    def loss(token_logps: Float[Tensor, "B L"], batch: TrainBatch) -> LossOutputs:
        mask = batch.action_mask
        anchor = batch.old_logps if uses_ratio else 0.0
        gains, log_ratio, clipped = gain(token_logps - anchor, batch.advantages, mask)
        importance, more = weigh(batch)
        gains = gains if importance is None else gains * importance
        other = batch.ref_logps if kl_to == "ref" else batch.old_logps
        difference = (
            torch.zeros_like(token_logps) if other is None else (other - token_logps) * mask
        )
        kls = _KL[kl](difference)
        if normaliser == "calls":
            share = _call_means(mask, batch)
            gains = gains * share
            kls = kls * share
        weights = token_weights(normaliser, mask, batch)
        total = (weights * (kl_coef * kls.sum(-1) - gains.sum(-1))).sum()
        metrics = _metrics(log_ratio, clipped, difference, mask, batch.num_scored)
        return LossOutputs(loss=total, metrics=metrics | more)

    uses_kl = kl_coef > 0
    return PolicyLoss(
        loss,
        uses_ratio or (uses_kl and kl_to == "old"),
        uses_kl and kl_to == "ref",
        kl_coef,
        clip_range,
        takes_ratio=uses_ratio,
        kl=kl,
        kl_to=kl_to,
    )


def _clipped_gain(
    ratio: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """min(w A, clip(w) A), and where the clip is what counts."""
    plain = ratio * advantage
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(plain, clipped), clipped < plain


def _row_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(x) up to x = 20 nats, its tangent e^20 (1 + x - 20) beyond: convex, smooth, and finite
    where exp overflows.

    A clamp would end the gradient there, just where PPO's unclipped branch (A < 0, ratio above 1)
    pushes hardest. Nats.
    """
    tangent = math.exp(_MAX_LOG_RATIO) * (1 + log_ratio - _MAX_LOG_RATIO)
    return torch.where(
        log_ratio > _MAX_LOG_RATIO, tangent, log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    )


def _k3(difference: Tensor) -> Tensor:
    return bounded_exp(difference) - difference - 1


_KL: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.neg,
    "k2": lambda d: d**2 / 2,
    "k3": _k3,
    "quadratic": lambda d: d.sum(-1, keepdim=True) ** 2 / 2,
}


def _metrics(
    log_ratio: Tensor, clipped: Tensor, to_ref: Tensor, mask: Tensor, count: float
) -> dict[str, Tensor]:
    """Token means over what was scored anywhere (``ratio/max_dev`` is a maximum); ``kl/*`` are k3,
    whatever the loss uses.
    """
    with torch.no_grad():
        ratio = bounded_exp(log_ratio)
        mean = partial(torch.div, other=max(count, 1.0))
        return {
            "ratio/mean": mean((ratio * mask).sum()),
            "ratio/clip_frac": mean((clipped & mask).sum()),
            # 0 if there is nothing
            "ratio/max_dev": pad(((ratio - 1).abs() * mask).flatten(), (0, 1)).max(),
            "kl/old": mean((_k3(-log_ratio) * mask).sum()),
            "kl/ref": mean((_k3(to_ref) * mask).sum()),
        }


def _clip_range(clip_low: float, clip_high: float) -> float:
    """min(-log(1 - clip_low), log(1 + clip_high)) in nats, of those that are not 0."""
    if not 0 <= clip_low < 1 or clip_high < 0:
        raise ValueError(
            f"need 0 <= clip_low < 1 and clip_high >= 0, got {clip_low} and {clip_high}"
        )
    ends = (-math.log1p(-clip_low), math.log1p(clip_high))
    return min((end for end in ends if end > 0), default=math.inf)


LOSSES = {
    "linear_bound": linear_bound,
    "reinforce": reinforce,
    "sequence_clip": sequence_clip,
    "token_clip": token_clip,
}
