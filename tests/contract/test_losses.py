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
def test_only_action_tokens_matter(name: str, kwargs: dict) -> None:
    batch = make_batch()
    logps = near(batch, 0.2)
    out = LOSSES[name](**kwargs)(logps, batch)
    out.loss.backward()
    assert (logps.grad[~MASK] == 0).all()
    other = torch.where(MASK, logps.detach(), -7.0)
    spoiled = make_batch(
        old_logps=torch.where(MASK, batch.old_logps, -3.0),
        ref_logps=torch.where(MASK, batch.ref_logps, 5.0),
    )
    again = LOSSES[name](**kwargs)(other, spoiled)
    assert again.loss.item() == pytest.approx(out.loss.item(), abs=1e-12)
    assert {k: v.item() for k, v in again.metrics.items()} == pytest.approx(
        {k: v.item() for k, v in out.metrics.items()}
    )


@EVERY
@pytest.mark.parametrize("ref", [True, False])
def test_empty_masks_are_finite_and_silent(name: str, kwargs: dict, ref: bool) -> None:
    batch = make_batch(mask=torch.zeros_like(MASK), ref=ref)
    logps = near(batch, 0.5)
    out = LOSSES[name](**kwargs)(logps, batch)
    out.loss.backward()
    assert out.loss.item() == 0
    assert (logps.grad == 0).all()
    assert all(v.item() == 0 for v in out.metrics.values())


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


@EVERY
def test_rows_add_up_under_the_global_counts(name: str, kwargs: dict) -> None:
    batch = make_batch()
    loss = LOSSES[name](**kwargs)
    logps = near(batch, 0.3)
    whole = loss(logps, batch)
    rows = [torch.tensor([i]) for i in range(4)]
    parts = [loss(logps[row], batch.rows(row)) for row in rows]
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), abs=1e-12)
    doubled = loss(logps, make_batch(num_actions=18.0, num_rows=6.0, num_groups=4.0))
    assert doubled.loss.item() == pytest.approx(whole.loss.item() / 2, abs=1e-12)


@EVERY
def test_inputs_are_left_alone_and_nothing_is_remembered(name: str, kwargs: dict) -> None:
    batch = make_batch()
    loss = LOSSES[name](**kwargs)
    logps = near(batch, 0.3)
    before = [batch.old_logps.clone(), batch.ref_logps.clone(), logps.detach().clone()]
    first = loss(logps, batch).loss.item()
    loss(logps * 2, batch)
    assert loss(logps, batch).loss.item() == first
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (batch.old_logps, batch.ref_logps, logps), strict=True)
    )
