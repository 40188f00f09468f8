"""``check_loss``: what the loop asks of a policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.losses import PolicyLoss
from ..core.types import LossOutputs, TrainBatch
from .cases import seeded
from .require import close, nothing_drawn, require

_MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


def check_loss(factory: Callable[..., PolicyLoss], **settings: Any) -> None:
    """AssertionError unless ``factory(**settings)`` keeps every promise of a ``PolicyLoss``.

    A finite scalar with a gradient, zero (and no gradient) where no token is an action; action
    tokens alone matter; rows add up under the global counts, and twice the counts give half the
    loss; the same call gives the same numbers and its inputs are left alone; metrics are finite
    detached scalars. ``uses_old``, ``uses_ref`` and ``uses_behavior`` say what it looks at. With
    ``kl_coef`` 0 rows without advantage have no gradient: the loop leaves them out.
    """
    with nothing_drawn("the loss"):
        loss = factory(**settings)
        require(
            isinstance(loss, PolicyLoss),
            f"the factory made a {type(loss).__name__}, expected a PolicyLoss",
        )
        _check_outputs(loss)
        _check_masks(loss)
        _check_sums(loss)
        _check_repeats(loss)
        _check_what_it_uses(loss)


def _batch(mask: Tensor = _MASK, **changes: Any) -> TrainBatch:
    old = -torch.rand(4, 4, generator=seeded(1), dtype=torch.float64)
    batch = TrainBatch(
        action_mask=mask,
        advantages=torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64),
        old_logps=old,
        ref_logps=old + 0.1 * torch.randn(4, 4, generator=seeded(2), dtype=torch.float64),
        behavior_logps=old.clone(),
        progress=torch.ones_like(old),
        calls=torch.tensor([1, 1, 2, 2]).expand(4, -1),
        group_actions=torch.tensor([5.0, 0.0, 5.0, 4.0], dtype=torch.float64),
        num_actions=9.0,
        num_rows=3.0,
        num_groups=2.0,
        num_scored=9.0,
    )
    return replace(batch, **changes)


def _near(batch: TrainBatch) -> Tensor:
    noise = torch.randn(4, 4, generator=seeded(3), dtype=torch.float64)
    return (batch.old_logps + 0.2 * noise).requires_grad_()


def _gradient(loss: PolicyLoss, logps: Tensor, batch: TrainBatch) -> Tensor:
    logps = logps.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(logps, batch).loss, logps)
    return found


def _check_outputs(loss: PolicyLoss) -> None:
    batch = _batch()
    out = loss(_near(batch), batch)
    require(isinstance(out, LossOutputs), f"it returned a {type(out).__name__}, not LossOutputs")
    require(
        out.loss.shape == () and bool(torch.isfinite(out.loss)) and out.loss.requires_grad,
        "the loss must be a finite scalar with a gradient",
    )
    for name, value in out.metrics.items():
        require(
            value.shape == () and not value.requires_grad and bool(torch.isfinite(value)),
            f"metric {name} must be a finite scalar without gradient",
        )


def _check_masks(loss: PolicyLoss) -> None:
    batch = _batch()
    logps = _near(batch).detach()
    gradient = _gradient(loss, logps, batch)
    require(not bool(gradient[~_MASK].any()), "tokens that are no actions have a gradient")
    ref = batch.ref_logps
    assert ref is not None
    spoiled = replace(
        batch,
        old_logps=torch.where(_MASK, batch.old_logps, -3.0),
        ref_logps=torch.where(_MASK, ref, 5.0),
    )
    first = loss(logps, batch)
    other = loss(torch.where(_MASK, logps, -7.0), spoiled)
    require(
        close(other.loss, first.loss), "log-probs of tokens that are no actions change the loss"
    )
    for name, value in first.metrics.items():
        require(
            close(other.metrics[name], value) or bool(value == 0),
            f"log-probs of tokens that are no actions change metric {name}",
        )
    for ref in (batch.ref_logps, None):
        empty = _batch(torch.zeros_like(_MASK), ref_logps=ref)
        if ref is None and loss.uses_ref:
            continue
        require(
            not bool(loss(logps, empty).loss) and not bool(_gradient(loss, logps, empty).any()),
            "a batch without actions must have loss 0 and no gradient",
        )


def _check_sums(loss: PolicyLoss) -> None:
    batch = _batch()
    logps = _near(batch).detach()
    whole = loss(logps, batch).loss
    rows = [torch.tensor([row]) for row in range(4)]
    parts = torch.stack([loss(logps[row], batch.rows(row)).loss for row in rows])
    scale = parts.abs().sum()
    require(
        close(torch.stack([parts.sum(), scale]), torch.stack([whole, scale])),
        "losses of single rows do not add up to the whole batch's: divide by the batch's global "
        "counts, not by what is there",
    )
    doubled = replace(batch, num_actions=18.0, num_rows=6.0, num_groups=4.0)
    require(
        close(2 * loss(logps, doubled).loss, whole),
        "twice the counts do not give half the loss: divide by num_actions, num_rows or num_groups",
    )


def _check_repeats(loss: PolicyLoss) -> None:
    batch = _batch()
    logps = _near(batch).detach()
    kept = [t.clone() for t in (batch.old_logps, batch.advantages, logps)]
    first = loss(logps, batch).loss
    loss(2 * logps, batch)
    require(torch.equal(loss(logps, batch).loss, first), "the same call gave another loss")
    same = zip(kept, (batch.old_logps, batch.advantages, logps), strict=True)
    require(all(torch.equal(a, b) for a, b in same), "it wrote to its inputs")


def _check_what_it_uses(loss: PolicyLoss) -> None:
    batch = _batch()
    logps = _near(batch).detach()
    first = _gradient(loss, logps, batch)
    others = {
        "uses_old": replace(batch, old_logps=batch.old_logps - 0.4),
        "uses_ref": replace(batch, ref_logps=batch.old_logps - 0.4),
        "uses_behavior": replace(batch, behavior_logps=batch.old_logps - 0.4),
    }
    for field, other in others.items():
        require(
            getattr(loss, field) or torch.equal(_gradient(loss, logps, other), first),
            f"{field} is False, and the gradient depends on it",
        )
    if loss.kl_coef == 0:
        flat = replace(batch, advantages=torch.zeros_like(batch.advantages))
        require(
            not bool(_gradient(loss, logps, flat).any()),
            "kl_coef is 0, and rows without advantage have a gradient: the loop leaves them out",
        )
