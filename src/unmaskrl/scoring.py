"""The only place where the model is called for a likelihood.

Logits exist only at rows that are scored, in chunks of bounded size whose activations are recomputed in the backward
pass, so memory does not grow with rows x vocabulary. ``backward_in_chunks`` bounds the activations of the body as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .decoding.sample import row_chunks
from .denoiser import Denoiser
from .estimators.base import Estimator
from .types import LossOutputs, Rollout, Views


def view_logps(denoiser: Denoiser, rollout: Rollout, views: Views) -> Float[Tensor, "B M L"]:
    """log p(ids[b, l] | view m of row b) in nats at rollout.temperature where weight != 0, else 0 (differentiable)."""
    flat_ids, flat_used, canvases = _used_canvases(views)
    return _score_canvases(denoiser, rollout, flat_ids, flat_used, canvases).reshape(views.ids.shape)


def token_logps(denoiser: Denoiser, rollout: Rollout, estimator: Estimator, views: Views) -> Float[Tensor, "B L"]:
    """The estimator's log-likelihood per action token (nats), reduced over its views."""
    return estimator.reduce(view_logps(denoiser, rollout, views), views)


@torch.no_grad()
def frozen_token_logps(
    denoiser: Denoiser, rollout: Rollout, estimator: Estimator, views: Views, *, max_canvases: int
) -> Float[Tensor, "B L"]:
    """``token_logps`` without gradient, ``max_canvases`` canvases at a time: for the old and the reference policy."""
    return estimator.reduce(_chunked_view_logps(denoiser, rollout, views, max_canvases), views)


def backward_in_chunks(
    denoiser: Denoiser,
    rollout: Rollout,
    estimator: Estimator,
    views: Views,
    loss_fn: Callable[[Tensor], LossOutputs],
    *,
    max_canvases: int,
) -> LossOutputs:
    """loss_fn(token_logps) and its backward pass, with at most ``max_canvases`` canvases' activations alive.

    Exact for any loss and any ``reduce``: view log-probs are computed without gradient, d loss / d view_logps is taken, and
    each chunk is run again with that gradient. Costs one extra forward, which is skipped when all canvases fit.
    """
    flat_ids, flat_used, canvases = _used_canvases(views)
    if len(canvases) <= max_canvases:
        out = loss_fn(token_logps(denoiser, rollout, estimator, views))
        if out.loss.requires_grad:
            out.loss.backward()
        return LossOutputs(loss=out.loss.detach(), metrics=out.metrics)
    leaf = _chunked_view_logps(denoiser, rollout, views, max_canvases).requires_grad_()
    out = loss_fn(estimator.reduce(leaf, views))
    if out.loss.requires_grad:
        (grad,) = torch.autograd.grad(out.loss, leaf)
        flat_grad = grad.reshape(flat_ids.shape)
        for chunk in canvases.split(max_canvases):
            _score_canvases(denoiser, rollout, flat_ids, flat_used, chunk).backward(flat_grad)
    return LossOutputs(loss=out.loss.detach(), metrics=out.metrics)


def replay_views(rollout: Rollout, mask_id: int) -> Views:
    """The rollout's own latents: view t is the canvas before call t, scored at the tokens that call t revealed.

    Their summed log-probs equal ``behavior_logps`` if scoring is sampling; max |difference| is a health metric.
    """
    ids, weight = [], []
    for call in range(1, max(1, int(rollout.nfe.max())) + 1):  # one empty view if nothing was drawn
        ids.append(rollout.latent(torch.full_like(rollout.nfe, call - 1), mask_id))
        weight.append(((rollout.decoded_step == call) & (call <= rollout.nfe)[:, None]).float())
    return Views(ids=torch.stack(ids, 1), weight=torch.stack(weight, 1))


def behavior_gap(denoiser: Denoiser, rollout: Rollout) -> float:
    """max |log p replayed on the rollout's own latents - behavior_logps| over its drawn tokens, in nats."""
    with torch.no_grad():
        replayed = view_logps(denoiser, rollout, replay_views(rollout, denoiser.mask_id)).sum(1)
    drawn = (rollout.decoded_step > 0) & (rollout.decoded_step <= rollout.nfe[:, None])
    return float(((replayed - rollout.behavior_logps).abs() * drawn).max())


def _used_canvases(views: Views) -> tuple[Tensor, Tensor, Int[Tensor, " N"]]:
    """Views as (B * M, L) rows, where they are scored, and which rows score anything: the others cost nothing."""
    flat_ids = views.ids.flatten(0, 1)
    flat_used = (views.weight != 0).flatten(0, 1)
    return flat_ids, flat_used, flat_used.any(-1).nonzero().squeeze(-1)


def _chunked_view_logps(denoiser: Denoiser, rollout: Rollout, views: Views, max_canvases: int) -> Float[Tensor, "B M L"]:
    flat_ids, flat_used, canvases = _used_canvases(views)
    with torch.no_grad():
        result = torch.zeros(flat_ids.shape, device=flat_ids.device)
        for chunk in canvases.split(max_canvases):
            result = result + _score_canvases(denoiser, rollout, flat_ids, flat_used, chunk)
    return result.reshape(views.ids.shape)


def _score_canvases(
    denoiser: Denoiser, rollout: Rollout, flat_ids: Tensor, flat_used: Tensor, canvases: Int[Tensor, " N"]
) -> Float[Tensor, "BM L"]:
    """Log-probs of the used positions of these canvases, zero elsewhere; rows of ``flat_ids`` are (row, view) pairs."""
    num_views = len(flat_ids) // len(rollout.ids)
    owner = canvases // num_views
    attention = rollout.attention_mask[owner]
    hidden = denoiser.hidden(flat_ids[canvases], None if bool(attention.all()) else attention)
    n, position = flat_used[canvases].nonzero(as_tuple=True)
    targets = rollout.ids[owner[n], position]
    logps = target_logps(denoiser, hidden[n, position], targets, rollout.temperature)
    result = torch.zeros(flat_ids.shape, dtype=logps.dtype, device=logps.device)
    return result.index_put((canvases[n], position), logps)


def target_logps(
    denoiser: Denoiser, hidden_RD: Float[Tensor, "R D"], targets: Int[Tensor, " R"], temperature: float
) -> Float[Tensor, " R"]:
    """log p(target) per row in nats, fp32 at least; each chunk's logits are recomputed in the backward pass."""

    def chunk_logps(hidden: Tensor, target: Tensor) -> Tensor:
        logits = denoiser.head(hidden.clone())  # a head may return its input, and these logits are overwritten
        wide = logits if logits.dtype == torch.float64 else logits.float()
        wide = wide if temperature in (0.0, 1.0) else wide.div_(temperature)
        result = _TargetLogps.apply(wide, target, denoiser.mask_id)
        assert isinstance(result, Tensor)
        return result

    chunks = list(row_chunks(len(hidden_RD), denoiser.vocab_size))
    if len(chunks) <= 1:
        return chunk_logps(hidden_RD, targets)
    parts = [
        checkpoint(chunk_logps, hidden_RD[rows], targets[rows], use_reentrant=False, preserve_rng_state=False)
        for rows in chunks
    ]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


class _TargetLogps(torch.autograd.Function):
    """``masked_log_softmax`` at the targets, in the memory of the logits: they become exp(logits - max), then the gradient.

    d log p(y) / d logits = 1[v = y] - p(v), 0 at the mask token.
    """

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets: Tensor, mask_id: int) -> Tensor:
        logits_RV[:, mask_id] = float("-inf")
        picked, top = logits_RV.gather(-1, targets[:, None]), logits_RV.amax(-1, keepdim=True)
        weights = logits_RV.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, targets)
        return (picked - top - total.log()).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weights, total, targets = ctx.saved_tensors
        (grad,) = grads
        grad_logits = weights.mul_(-grad[:, None] / total)
        grad_logits.scatter_add_(-1, targets[:, None], grad[:, None])
        return grad_logits, None, None
