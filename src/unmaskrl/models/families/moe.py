"""Mixtures of experts: which experts a token goes to, and their sum.

    y = sum_e w_e expert_e(x)  over the experts that the router chose, w from the router

Tokens are sorted by expert, so that each expert is one product over its tokens. Gradients reach
experts in training and in eval mode. Choices and weights are computed in float32 at least: in
bfloat16 a few percent of the tokens would go to other experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .common import SwiGLU

EXPERTS = ".experts."  # in the names of the experts' parts, shared ones apart
EXPERT_COUNTS = ("n_experts", "top_experts", "expert_size")  # of a config, at least 1


def check_experts(config: Any) -> None:
    """Refuse more chosen experts than there are (ValueError)."""
    if config.top_experts > config.n_experts:
        raise ValueError(
            f"{config.key('top_experts')} {config.top_experts} is above "
            f"{config.key('n_experts')} {config.n_experts}"
        )


def softmax_choice(
    logits: Float[Tensor, "N E"], top: int, renormalise: bool
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Qwen3-MoE's: the ``top`` most probable experts, weighted by their probability (of their sum,
    with ``renormalise``).
    """
    weights, chosen = logits.softmax(-1).topk(top, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights


def grouped_sigmoid_choice(
    logits: Float[Tensor, "N E"],
    bias: Float[Tensor, " E"],
    top: int,
    groups: int,
    top_groups: int,
    factor: float,
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """LLaDA2's: the ``top`` experts by sigmoid + ``bias`` among the ``top_groups`` best groups.

    A group is as good as its two best experts together. Weights are the sigmoids alone, as a share
    of their sum, times ``factor``: the bias has a part in the choice only.
    """
    score = logits.sigmoid()
    biased = score.detach() + bias
    grouped = biased.unflatten(-1, (groups, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(top_groups, -1).indices
    allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
    open_to = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    chosen = open_to.topk(top, -1).indices
    weights = score.gather(-1, chosen)
    return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * factor


# what config.json calls the counts and sizes of experts
EXPERT_KEYS = {
    "n_experts": "num_experts",
    "top_experts": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}


class Router(nn.Module):
    """One score per expert; ``choose`` makes experts and weights of scores and, if it has one,
    ``expert_bias``.

    No linear layer, so that adapters and 4 bits leave it alone. The bias is no parameter, and stays
    in float32 when the module is converted: rounded to bfloat16 it would change most choices.
    """

    expert_bias: Tensor | None

    def __init__(
        self, d_model: int, experts: int, choose: Callable[..., Any], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_model))
        own = torch.zeros(experts, dtype=torch.float32) if bias else None
        self.register_buffer("expert_bias", own)
        self.choose = choose

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Chosen experts and their weights."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        return self.choose(logits, *([] if self.expert_bias is None else [self.expert_bias]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        exact = self.expert_bias
        super()._apply(fn, recurse)
        now = self.expert_bias
        if exact is not None and now is not None and now.dtype.itemsize < 4:
            self.expert_bias = exact.to(now.device, torch.float32)
        return self


class Mixture(nn.Module):
    """The experts of a layer behind its router, and one that every token goes to, if there is one.

    Published names: ``gate``, ``experts.0.gate_proj``, ..., ``shared_experts.gate_proj``.
    """

    def __init__(
        self, d_model: int, width: int, experts: int, router: Router, shared: int = 0
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = nn.ModuleList([SwiGLU(d_model, width) for _ in range(experts)])
        self.shared_experts = SwiGLU(d_model, width * shared) if shared else None

    @property
    def learns(self) -> bool:
        """Whether the experts' weights are trained."""
        return any(p.requires_grad for p in self.experts[0].parameters())

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        flat = x.flatten(0, -2)
        chosen, weights = self.gate(flat)
        each = chosen.flatten()
        order = each.argsort(stable=True)
        counts = torch.bincount(each, minlength=len(self.experts)).tolist()
        parts = flat[order // chosen.shape[-1]].split(counts)
        # experts without tokens get a gradient of zeros: ranks that share their weights must agree
        # on which have one, and so must one process and two
        all_of_them = torch.is_grad_enabled() and self.learns
        outputs = [
            expert(part)
            for expert, part in zip(self.experts, parts, strict=True)
            if all_of_them or len(part)
        ]
        # back into the order of tokens: a sum over each token's experts, in a fixed order
        own = torch.cat([flat[:0], *outputs])[order.argsort()].unflatten(0, chosen.shape)
        y = (own * weights[..., None].to(own.dtype)).sum(1).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)
