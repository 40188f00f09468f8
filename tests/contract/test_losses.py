"""What every policy loss promises. A new one adds a line of keyword arguments to SETTINGS."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded, train_batch
from unmaskrl.core.losses import LOSSES
from unmaskrl.core.types import TrainBatch
from unmaskrl.testing import check_loss

SETTINGS = {
    "linear_bound": [{}, {"dual_clip": 1.5, "kl_coef": 0.1, "kl": "quadratic"}],
    "reinforce": [
        {},
        {"kl_coef": 0.1, "normaliser": "rows"},
        {"kl_coef": 0.2, "kl": "k2", "normaliser": "groups"},
    ],
    "token_clip": [
        {},
        {"clip_low": 0.0, "clip_high": 0.0, "kl_coef": 0.0},
        {"clip_high": 0.28, "kl_coef": 1.0},
        {"kl": "k1", "normaliser": "sequence"},
        {"kl": "k2", "kl_to": "old", "kl_coef": 0.3, "normaliser": "group"},
    ],
    "sequence_clip": [
        {},
        {"kl_coef": 0.0},
        {"clip_low": 3e-4, "clip_high": 4e-4},
        {"kl": "quadratic", "kl_coef": 0.003},
        {"normaliser": "token"},
    ],
}
ALL = [(name, kwargs) for name, settings in SETTINGS.items() for kwargs in settings]
EVERY = pytest.mark.parametrize(("name", "kwargs"), ALL, ids=str)
METRICS = {"ratio/mean", "ratio/clip_frac", "ratio/max_dev", "kl/old", "kl/ref"}
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


def test_every_loss_is_in_this_battery() -> None:
    assert set(SETTINGS) == set(LOSSES)


def make_batch(
    *, mask: Tensor = MASK, advantages=(1.0, -1.0, 2.0, -0.5), ref: bool = True, **changes
) -> TrainBatch:
    old = -torch.rand(4, 4, generator=seeded(1), dtype=torch.float64)
    fields = {
        "old": old,
        "ref": old + 0.1 * torch.randn(4, 4, generator=seeded(2), dtype=torch.float64)
        if ref
        else None,
        **{"num_actions": 9.0, "num_rows": 3.0, "num_groups": 2.0, "num_scored": 9.0},
        "group_actions": torch.tensor([5.0, 0.0, 5.0, 4.0], dtype=torch.float64),
    }
    return replace(
        train_batch(mask, torch.tensor(advantages, dtype=torch.float64), **fields), **changes
    )


def near(batch: TrainBatch, size: float) -> Tensor:
    noise = torch.randn(4, 4, generator=seeded(3), dtype=torch.float64)
    return (batch.old_logps + size * noise).requires_grad_()


@EVERY
def test_the_contract(name: str, kwargs: dict) -> None:
    check_loss(LOSSES[name], **kwargs)


@EVERY
def test_at_unchanged_weights_ratios_are_1_and_the_gradient_is_the_policy_gradient(
    name: str, kwargs: dict
) -> None:
    batch = make_batch(ref=False)
    logps = near(batch, 0.0)
    out = LOSSES[name](**kwargs)(logps, batch)
    assert (
        out.metrics["ratio/max_dev"] == 0
        and out.metrics["ratio/clip_frac"] == 0
        and out.metrics["kl/old"] == 0
    )
    assert float(out.metrics["ratio/mean"]) == pytest.approx(1.0)
    if kwargs.get("clip_low") == 0.0:
        return  # the clamp's corner: any subgradient will do
    out.loss.backward()
    sign = -torch.sign(batch.advantages)[:, None] * MASK
    assert torch.equal(torch.sign(logps.grad), sign)


@EVERY
def test_metrics_are_detached_scalars_of_the_agreed_names(name: str, kwargs: dict) -> None:
    batch = make_batch()
    out = LOSSES[name](**kwargs)(near(batch, 0.2), batch)
    assert set(out.metrics) == METRICS
    assert all(
        v.shape == () and not v.requires_grad and torch.isfinite(v) for v in out.metrics.values()
    )
    assert out.loss.requires_grad


@EVERY
def test_zero_advantages_leave_the_kl_term_only(name: str, kwargs: dict) -> None:
    batch = make_batch(advantages=(0.0, 0.0, 0.0, 0.0))
    logps = near(batch, 0.2)
    out = LOSSES[name](**kwargs)(logps, batch)
    assert out.loss.item() == pytest.approx(
        plain_kl(name, kwargs, logps.detach(), batch), abs=1e-12
    )
    assert (out.loss.item() != 0) == (default(name, kwargs, "kl_coef") > 0)
    if default(name, kwargs, "kl_to") == "ref":
        difference = (batch.ref_logps - logps.detach())[MASK]
        assert out.metrics["kl/ref"].item() == pytest.approx(
            float((difference.exp() - difference - 1).sum() / 9), abs=1e-9
        )


def default(name: str, kwargs: dict, key: str):
    return kwargs.get(key, inspect.signature(LOSSES[name]).parameters[key].default)


def plain_kl(name: str, kwargs: dict, logps: Tensor, batch: TrainBatch) -> float:
    """kl_coef * the KL term, token by token."""
    other = batch.ref_logps if default(name, kwargs, "kl_to") == "ref" else batch.old_logps
    kind = default(name, kwargs, "kl")
    normaliser = default(name, kwargs, "normaliser")
    kinds = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - d - 1}
    total = 0.0
    for row in range(4):
        differences = [float(other[row, i] - logps[row, i]) for i in range(4) if MASK[row, i]]
        if not differences:
            continue
        value = (
            sum(differences) ** 2 / 2
            if kind == "quadratic"
            else sum(kinds[kind](d) for d in differences)
        )
        per = {
            "token": 9,
            "sequence": 3 * len(differences),
            "group": 2 * float(batch.group_actions[row]),
            "rows": 3,
        }
        per["groups"] = 2
        total += value / per[normaliser]
    return default(name, kwargs, "kl_coef") * total
