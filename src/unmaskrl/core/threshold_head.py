"""The prompt-aware threshold: a small head that chooses gamma of entropy-bounded decoding per
rollout (DiFFPO, 2510.02212).

That a threshold per prompt is trained by policy gradient is the paper's; features, head, grid,
reward and constants are ours (docs/diffpo.md). Features are the mean hidden state over the prompt
in the first denoising call, which decoding makes anyway; no gradient flows into the denoiser. The
policy is a categorical over a grid of gammas,

    pi(gamma_k | q) = (1 - K floor) softmax(head(features))_k + floor,

and starts as a peak at one gamma. Each rollout draws its own, so that rollouts of a group can be
compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .precision import finest, finest_dtype

GAMMAS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


class ThresholdHead(nn.Module):
    """LayerNorm, Linear(d, width), GELU, Linear(width, K): logits over the grid, constant (a peak
    at ``start``) at first.

    All weights but the last bias are 0 until ``init_weights`` draws the inner layer; without it the
    head stays constant.
    """

    def __init__(
        self,
        d_model: int,
        gammas: Sequence[float] = GAMMAS,
        *,
        start: float = 0.1,
        width: int = 128,
        floor: float = 0.02,
    ) -> None:
        super().__init__()
        check_grid(gammas, start, floor)
        self.d_model = d_model
        self.grid = tuple(gammas)
        self.start = start
        self.width = width
        self.floor = floor
        self.norm = nn.LayerNorm(d_model)
        # nn.Linear's own initialisation would draw from the global generator
        with torch.device("meta"):
            inner = nn.Linear(d_model, width)
            outer = nn.Linear(width, len(gammas))
        self.inner = inner.to_empty(device="cpu")
        self.outer = outer.to_empty(device="cpu")
        distance = (torch.arange(len(gammas)) - self.grid.index(start)).abs()
        with torch.no_grad():
            for empty in (self.inner.weight, self.inner.bias, self.outer.weight):
                nn.init.zeros_(empty)
            self.outer.bias.copy_(-2.0 * distance)

    def init_weights(self, generator: torch.Generator) -> ThresholdHead:
        """Draw the inner layer from ``generator``; returns self."""
        bound = 1 / math.sqrt(self.d_model)
        with torch.no_grad():
            nn.init.uniform_(self.inner.weight, -bound, bound, generator=generator)
            nn.init.zeros_(self.inner.bias)
        return self

    def log_probs(self, features_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """log pi(gamma_k | q), each at least log(floor)."""
        logits = self.outer(torch.nn.functional.gelu(self.inner(self.norm(features_BD))))
        if self.floor == 0:
            # the logarithm of a probability that underflows would be -inf
            return logits.log_softmax(-1)
        return ((1 - len(self.grid) * self.floor) * logits.softmax(-1) + self.floor).log()

    @torch.no_grad()
    def act(
        self, features_BD: Float[Tensor, "B D"], uniform: Float[Tensor, " B"]
    ) -> tuple[Int[Tensor, " B"], Tensor]:
        """Draw a grid index per row by inverse CDF; and its log-probability (B,)."""
        logps_BK = self.log_probs(features_BD)
        cdf = finest(logps_BK).exp().cumsum(-1)
        index = (
            torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
            .squeeze(-1)
            .clamp(max=len(self.grid) - 1)
        )
        return index, logps_BK.gather(-1, index[:, None]).squeeze(-1)

    @torch.no_grad()
    def best(self, features_BD: Float[Tensor, "B D"]) -> Int[Tensor, " B"]:
        """The most probable grid index: what evaluation decodes with."""
        return self.log_probs(features_BD).argmax(-1)

    def gammas(self, index: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Grid values, nats."""
        return torch.tensor(self.grid, dtype=finest_dtype(index.device), device=index.device)[index]


def prompt_features(
    hidden: Float[Tensor, "B L D"], prompt_mask: Bool[Tensor, "B L"]
) -> Float[Tensor, "B D"]:
    """Mean hidden state over the prompt, fp32, without gradient."""
    weight = prompt_mask[..., None]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return ((hidden * weight).sum(1, dtype=wide) / weight.sum(1).clamp(min=1)).detach().float()


def best_gamma(
    head: ThresholdHead, prompt_mask: Bool[Tensor, "B L"]
) -> Callable[[Tensor, Tensor], Tensor]:
    """``gamma`` for ``decode``: each prompt's most probable threshold; NaN, which decode refuses,
    from a head that is.
    """

    def gamma(hidden: Tensor, rows: Tensor) -> Tensor:
        top = head.log_probs(prompt_features(hidden, prompt_mask[rows])).max(-1)
        return torch.where(top.values.isnan(), math.nan, head.gammas(top.indices))

    return gamma


def threshold_loss(
    head: ThresholdHead,
    features_BD: Float[Tensor, "B D"],
    index: Int[Tensor, " B"],
    old_logps: Float[Tensor, " B"],
    advantages: Float[Tensor, " B"],
    *,
    clip: float,
    entropy_coef: float,
    num_rows: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """-(1 / num_rows) sum_b [ min(k_b B_b, clip(k_b, 1 - clip, 1 + clip) B_b) + entropy_coef H(pi(.
    | q_b)) ], k = pi / pi_old.

    ``num_rows`` is the global count. Metrics are sums over rows divided by it.
    """
    logps_BK = head.log_probs(features_BD)
    ratio = (logps_BK.gather(-1, index[:, None]).squeeze(-1) - old_logps).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    entropy = -(logps_BK.exp() * logps_BK).sum(-1)
    count = max(num_rows, 1.0)
    metrics = {
        "sampler/entropy": entropy.detach().sum() / count,
        "sampler/ratio_dev": (ratio.detach() - 1).abs().sum() / count,
        "sampler/clip_frac": ((ratio.detach() - 1).abs() > clip).sum() / count,
    }
    return -(gain + entropy_coef * entropy).sum() / count, metrics


def speed_reward(
    rewards: Float[Tensor, " B"],
    correct: Bool[Tensor, " B"],
    nfe: Int[Tensor, " B"],
    *,
    alpha: float,
    max_calls: int,
) -> Float[Tensor, " B"]:
    """r - alpha * correct * nfe / max_calls: only right answers gain by being fast. ``alpha`` is in
    units of reward.

    A slow right answer beats a wrong one as long as their rewards differ by more than alpha.
    """
    return rewards - alpha * correct.to(rewards.dtype) * nfe.to(rewards.dtype) / max_calls


def check_grid(gammas: Sequence[float], start: float, floor: float) -> None:
    """A grid that holds the exact sampler (0) and increases; a start on it; a floor that leaves
    something to choose.
    """
    if len(gammas) < 2 or gammas[0] != 0 or any(b <= a for a, b in itertools.pairwise(gammas)):
        raise ValueError(
            f"gammas must start with 0 (one token per call) and increase, got {list(gammas)}"
        )
    if start not in gammas:
        raise ValueError(
            f"start is the gamma that training begins with, one of {list(gammas)}; got {start}"
        )
    if not 0 <= floor * len(gammas) < 1:
        raise ValueError(
            f"floor is every gamma's least probability, below 1/{len(gammas)} for {len(gammas)} "
            f"gammas; got {floor}"
        )
