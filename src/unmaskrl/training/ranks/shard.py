"""Weights split over ranks, by torch's FSDP2: the blocks' parameters, gradients and
optimiser state.

What is outside the blocks (embedding, final norm, output head) stays whole on every rank, so logits
at chosen rows need no collective. Collectives inside the body are calls that all ranks must make
alike, while rows finish at different calls:

- passes without gradient use a whole copy of the weights (``train.gather_rollout``, refreshed once
  per phase: no collective,
  nobody waits), or, where that does not fit, run in lock-step: a rank that is done answers with
  one-token calls until all are;
- passes with gradient are counted, and every rank runs as many as the rank with most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ...models.denoiser import ModelDenoiser
from ...models.weights import trainable, whole


def shard_blocks(model: Any, mode: str) -> None:
    """Split the blocks over all ranks: ``fsdp`` gathers a block for each pass, ``zero2`` once for
    forward and backward.

    Gradients are summed over ranks. Build the optimiser afterwards: the blocks' parameters are
    replaced.
    """
    blocks = model.blocks
    device = "cuda" if next(model.parameters()).is_cuda else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = {p for p in model.parameters() if id(p) not in inside}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=mode == "fsdp")
    fully_shard(model, mesh=mesh, ignored_params=outside)
    register_fsdp_forward_method(model, "hidden")
    register_fsdp_forward_method(model, "hidden_under")
    model.cpu_chunk = None  # batches cut into chunks would be calls that other ranks do not make
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _sum_not_mean(module)


class Lockstep(ModelDenoiser):
    """A sharded model for passes without gradient: ranks may call it differently often, and end
    with ``finish_lockstep``.
    """

    def passing(self) -> AbstractContextManager[None]:
        """Tell the others that a call comes."""
        _someone_calls(self.device, True)
        return super().passing()


@torch.no_grad()
def finish_lockstep(denoiser: Lockstep) -> None:
    """Go on with calls of one token until every rank is done; then let go of blocks that ``zero2``
    holds for a backward pass.

    Gathered blocks would hide the shards: weights that are then averaged, loaded or saved would be
    the wrong tensors.
    """
    while _someone_calls(denoiser.device, False):
        denoiser.model.hidden(torch.full((1, 1), denoiser.mask_id, device=denoiser.device))
    for module in denoiser.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_split(parameter: Tensor) -> bool:
    """Whether this rank holds a part of it only."""
    return isinstance(parameter, DTensor)


@dataclass(slots=True)
class Gathered:
    """A whole copy of sharded weights for passes without gradient; ``refresh`` fetches the current
    ones (all ranks call).
    """

    sharded: nn.Module
    plain: ModelDenoiser

    @torch.no_grad()
    def refresh(self) -> ModelDenoiser:
        """Copy every trained tensor into the plain module."""
        target = dict(self.plain.model.named_parameters())
        for name, parameter in trainable(self.sharded).items():
            target[name].copy_(whole(parameter))
        return self.plain


def extra_passes(denoiser: ModelDenoiser, own: int, most: int) -> None:
    """Forward and backward passes of weight 0, so that a rank with ``own`` gradient passes makes
    ``most``.
    """
    for _ in range(most - own):
        hidden = denoiser.hidden(torch.full((1, 1), denoiser.mask_id, device=denoiser.device))
        (hidden.sum() * 0).backward()


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, total: Callable[[float], float]
) -> float:
    """Norm of sharded and whole gradients together, before they are scaled down to ``max_norm``;
    ``total`` sums over ranks.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    split = [g.to_local() for g in grads if isinstance(g, DTensor)]
    kept = [g for g in grads if not isinstance(g, DTensor)]
    norm = math.sqrt(total(_squares(split)) + _squares(kept))
    for grad in (*split, *kept):
        grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


def _squares(tensors: list[Tensor]) -> float:
    # vector_norm sums in double without a copy in double
    return float(sum(torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for t in tensors))


def _someone_calls(device: torch.device, calling: bool) -> bool:
    flag = torch.tensor(float(calling), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _sum_not_mean(module: Any) -> None:
    if hasattr(module, "set_gradient_divide_factor"):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
        module.set_gradient_divide_factor(1.0)
    else:  # its name before torch 2.8
        module.set_reduce_scatter_divide_factor(1.0)
