"""Policy losses against hand-worked numbers; clipping on both sides, k3, empty masks,
micro-batches.
"""

from __future__ import annotations

import inspect
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import same_maths, seeded, train_batch
from unmaskrl.core.losses import LOSSES, bounded_exp, linear_bound, sequence_clip, token_clip
from unmaskrl.core.types import TrainBatch


def batch(mask, advantages, old, ref=None, **counts) -> TrainBatch:
    old = torch.tensor(old, dtype=torch.float64)
    advantages = torch.tensor(advantages, dtype=torch.float64)
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    return train_batch(torch.tensor(mask, dtype=torch.bool), advantages, old, ref, **counts)


def at_ratios(ratios, old=0.0) -> Tensor:
    return (torch.tensor(ratios, dtype=torch.float64).log() + old).requires_grad_()


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope", "clipped"),
    [
        (1.0, 2.0, 2.0, 2.0, False),
        (1.1, 2.0, 2.2, 2.2, False),
        (1.5, 2.0, 2.4, 0.0, True),  # high side: A > 0 is clipped at 1.2 A
        (0.5, 2.0, 1.0, 1.0, False),  # min() lets a worse ratio through
        (0.5, -2.0, -1.4, 0.0, True),  # low side: A < 0 is clipped at 0.7 A
        (1.5, -2.0, -3.0, -3.0, False),
        (1.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipping_of_one_token(
    ratio: float, advantage: float, gain: float, slope: float, clipped: bool
) -> None:
    for factory in (token_clip, sequence_clip):
        logps = at_ratios([[ratio]])
        out = factory(clip_low=0.3, clip_high=0.2, kl_coef=0.0)(
            logps, batch([[1]], [advantage], [[0.0]])
        )
        out.loss.backward()
        assert out.loss.item() == pytest.approx(-gain, abs=1e-12)
        assert float(logps.grad) == pytest.approx(-slope, abs=1e-12)  # d w / d l = w
        assert float(out.metrics["ratio/clip_frac"]) == float(clipped)
        assert float(out.metrics["ratio/mean"]) == pytest.approx(ratio)
        assert float(out.metrics["ratio/max_dev"]) == pytest.approx(abs(ratio - 1))
        assert float(out.metrics["kl/old"]) == pytest.approx(1 / ratio - 1 + log(ratio), abs=1e-12)


def test_token_clip_by_hand() -> None:
    # Row 0: A = 1, ratios 1.5 (clipped to 1.2) and 0.9; row 1: A = -2, ratio 1.1; the fourth cell
    # is no action.
    logps = at_ratios([[1.5, 0.9], [1.1, 7.0]], old=-1.0)
    data = batch([[1, 1], [1, 0]], [1.0, -2.0], [[-1.0, -1.0], [-1.0, -1.0]])
    out = token_clip(kl_coef=0.0)(logps, data)
    assert out.loss.item() == pytest.approx(-(1.2 + 0.9 - 2.2) / 3, abs=1e-12)
    out.loss.backward()
    assert logps.grad.tolist() == [[0.0, pytest.approx(-0.3)], [pytest.approx(2.2 / 3), 0.0]]
    assert float(out.metrics["ratio/mean"]) == pytest.approx((1.5 + 0.9 + 1.1) / 3)
    assert float(out.metrics["ratio/clip_frac"]) == pytest.approx(1 / 3)
    assert float(out.metrics["ratio/max_dev"]) == pytest.approx(0.5)


def test_sequence_clip_by_hand() -> None:
    # Row 0: geometric mean of 2 and 0.5 is 1; row 1: mean of (4, 1, 1) is 4^(1/3) = 1.587, clipped
    # at 1.2; row 2: no action.
    logps = at_ratios([[2.0, 0.5, 9.0], [4.0, 1.0, 1.0], [3.0, 3.0, 3.0]], old=-2.0)
    data = batch([[1, 1, 0], [1, 1, 1], [0, 0, 0]], [3.0, 1.0, 5.0], [[-2.0] * 3] * 3)
    assert data.num_rows == 2
    out = sequence_clip(kl_coef=0.0)(logps, data)
    assert out.loss.item() == pytest.approx(-(3.0 + 1.2) / 2, abs=1e-12)
    out.loss.backward()
    assert logps.grad.tolist() == [
        [pytest.approx(-0.75), pytest.approx(-0.75), 0.0],
        [0.0] * 3,
        [0.0] * 3,
    ]
    # of tokens
    assert float(out.metrics["ratio/mean"]) == pytest.approx((2 * 1 + 3 * 4 ** (1 / 3)) / 5)
    assert float(out.metrics["ratio/clip_frac"]) == pytest.approx(3 / 5)


def test_the_ratio_of_whole_sequences_by_hand() -> None:
    # Row 0: 2 * 0.5 * 1.1 = 1.1; row 1: 1.1 * 1.2 * 1 = 1.32, clipped at 1.2; a token's mean would
    # not be.
    logps = at_ratios([[2.0, 0.5, 1.1], [1.1, 1.2, 1.0]], old=-2.0)
    data = batch([[1, 1, 1], [1, 1, 1]], [3.0, 1.0], [[-2.0] * 3] * 2)
    out = sequence_clip(kl_coef=0.0, per_token=False)(logps, data)
    assert out.loss.item() == pytest.approx(-(3.3 + 1.2) / 2, abs=1e-12)
    out.loss.backward()
    assert logps.grad.tolist() == [[pytest.approx(-3.3 / 2)] * 3, [0.0] * 3]


def test_every_call_counts_the_same_by_hand() -> None:
    # Row 0: calls 1 (tokens 2 and 4) and 3 (token 10): (3 + 10) / 2; row 1: call 2 alone; row 2 has
    # no actions.
    logps = torch.tensor([[2.0, 4.0, 10.0], [6.0, 9.0, 9.0], [9.0] * 3], dtype=torch.float64)
    logps.requires_grad_()
    data = batch(
        [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
        [1.0, -1.0, 5.0],
        [[0.0] * 3] * 3,
        calls=torch.tensor([[1, 1, 3], [2, 3, 1], [1, 2, 3]]),
    )
    out = LOSSES["reinforce"](normaliser="calls")(logps, data)
    assert out.loss.item() == pytest.approx(-((3 + 10) / 2 - 6) / 2, abs=1e-12)
    out.loss.backward()
    assert logps.grad.tolist() == [[-0.125, -0.125, -0.25], [0.5, 0.0, 0.0], [0.0] * 3]
    with pytest.raises(ValueError, match="quadratic is one term per row"):
        sequence_clip(kl="quadratic", normaliser="calls")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_k3_by_hand(name: str) -> None:
    # d = ref - new = 0.5 and -1 at the two actions of 2 rows; k3 = e^d - d - 1; token mean in both
    # losses.
    logps = torch.tensor([[-1.0, -9.0], [-1.0, -9.0]], dtype=torch.float64, requires_grad=True)
    data = batch(
        [[1, 0], [1, 0]], [0.0, 0.0], [[-1.0, 0.0], [-1.0, 0.0]], ref=[[-0.5, 0.0], [-2.0, 0.0]]
    )
    out = LOSSES[name](kl_coef=0.5)(logps, data)
    k3 = (exp(0.5) - 1.5 + exp(-1.0) + 1.0 - 1.0) / 2
    assert out.loss.item() == pytest.approx(0.5 * k3, abs=1e-12)
    assert float(out.metrics["kl/ref"]) == pytest.approx(k3, abs=1e-12)
    out.loss.backward()
    assert logps.grad[:, 0].tolist() == pytest.approx(
        [0.25 * (1 - exp(0.5)), 0.25 * (1 - exp(-1.0))], abs=1e-12
    )


@pytest.mark.parametrize("name", ["token_clip", "sequence_clip"])
def test_huge_log_ratios_stay_finite(name: str) -> None:
    logps = torch.tensor([[800.0], [-800.0]], dtype=torch.float32, requires_grad=True)
    data = batch([[1], [1]], [-1.0, 1.0], [[0.0], [0.0]], ref=[[0.0], [0.0]])
    out = LOSSES[name]()(logps, data)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(logps.grad).all()
    assert all(torch.isfinite(v) for v in out.metrics.values())
    # Plain GRPO terms on the tangent e^20 (x - 19): min() does not clip A < 0 from above; the
    # second row's gain is 0.
    k3 = (800 - 1 + 781 * exp(20) - 800 - 1) / 2
    assert out.loss.item() == pytest.approx(781 * exp(20) / 2 + 0.04 * k3, rel=1e-6)


EDGES = [-800.0, -21.0, -19.0, -1.0, 19.0, 19.999, 20.001, 21.0, 25.0, 800.0]


def test_bounded_exp_is_exp_and_beyond_20_its_tangent() -> None:
    x = torch.tensor(EDGES, dtype=torch.float64, requires_grad=True)
    value = bounded_exp(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    for k, at in enumerate(EDGES):
        want = (exp(at), exp(at)) if at <= 20 else (exp(20) * (1 + at - 20), exp(20))
        assert (float(value[k].detach()), float(slope[k])) == pytest.approx(want, rel=1e-12)
    # rises, and bends upwards only
    assert (value.detach().diff() >= 0).all() and (slope.diff() >= 0).all()
    assert (
        float(bounded_exp(torch.tensor(float("-inf")))) == 0
        and bounded_exp(torch.tensor(float("nan"))).isnan()
    )
    assert bounded_exp(torch.tensor(1e20)).isfinite()  # in fp32


@pytest.mark.parametrize("name", ["token_clip", "sequence_clip", "linear_bound"])
@pytest.mark.parametrize("advantage", [-1.5, 1.5])
@pytest.mark.parametrize("log_ratio", EDGES)
def test_beyond_the_guard_the_gradient_is_that_of_the_formula(
    name: str, advantage: float, log_ratio: float
) -> None:
    """Finite differences; and by hand, where PPO leaves a token unclipped: pushed away from where
    its advantage is not.
    """
    step = 1e-5 * max(1.0, abs(log_ratio)) if log_ratio != 19.999 and log_ratio != 20.001 else 1e-6

    def loss(at: float) -> tuple[float, float]:
        logps = torch.tensor([[at]], dtype=torch.float64, requires_grad=True)
        out = LOSSES[name](kl_coef=0.3)(logps, batch([[1]], [advantage], [[0.0]], ref=[[0.5]]))
        out.loss.backward()
        return out.loss.item(), float(logps.grad)

    (_, got), high, low = loss(log_ratio), loss(log_ratio + step)[0], loss(log_ratio - step)[0]
    assert got == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-6)
    d = 0.5 - log_ratio
    kl = 0.3 * (1 - exp(min(d, 20)))
    if name == "linear_bound":
        slope = 1.0 if advantage > 0 and log_ratio < 0.2 else 0.0
        slope = exp(log_ratio) if advantage < 0 and log(0.8) < log_ratio < log(3) else slope
    else:
        unclipped = log_ratio < log(1.2) if advantage > 0 else log_ratio > log(0.8)
        slope = exp(min(log_ratio, 20)) if unclipped else 0.0
    assert got == pytest.approx(kl - advantage * slope, rel=1e-9)
    if name != "linear_bound" and advantage < 0 and log_ratio > 1:
        assert got > 1  # a gradient step lowers a token that became far too likely


@pytest.mark.parametrize("name", ["token_clip", "sequence_clip"])
def test_published_defaults(name: str) -> None:
    logps = at_ratios([[1.5]])
    data = batch([[1]], [1.0], [[0.0]], ref=[[log(3.0)]])
    out = LOSSES[name]()(logps, data)
    assert out.loss.item() == pytest.approx(-1.2 + 0.04 * (2 - log(2) - 1), abs=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    generator = seeded(5)
    shape = (7, 5)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[3] = False
    data = train_batch(
        mask,
        torch.randn(7, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3,
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3,
    )
    logps = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).requires_grad_()
    loss = LOSSES[name](kl_coef=0.1)
    whole = loss(logps, data)
    whole.loss.backward()
    expected = logps.grad
    logps.grad = None
    parts = []
    for rows in (torch.tensor([6, 0]), torch.tensor([3]), torch.tensor([1, 2, 4, 5])):
        parts.append(loss(logps[rows], data.rows(rows)))
        parts[-1].loss.backward()
    assert same_maths(logps.grad, expected)
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), abs=1e-12)
    for key, value in whole.metrics.items():
        combine = max if key.endswith("max_dev") else sum
        assert combine(float(p.metrics[key]) for p in parts) == pytest.approx(
            float(value), abs=1e-6
        ), key


BAD = [{"clip_low": -0.1}, {"clip_low": 1.0}, {"clip_high": -0.1}, {"dual_clip": 1.0}]
BAD += [{"kl_coef": -1.0}, {"kl": "k4"}, {"kl_to": "base"}, {"normaliser": "mean"}]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("kwargs", BAD, ids=str)
def test_bad_settings_are_refused(name: str, kwargs: dict[str, Any]) -> None:
    (key,) = kwargs
    if key in inspect.signature(LOSSES[name]).parameters:
        with pytest.raises(ValueError, match=f"{key}.*got"):
            LOSSES[name](**kwargs)


def test_reinforce_by_hand() -> None:
    # Gains A * (sum of log-probs): 2 * -3 and -1 * -1; 3 tokens, 2 rows, 1 group of 3 tokens.
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -9.0]], dtype=torch.float64, requires_grad=True)
    data = batch(
        [[1, 1], [1, 0]],
        [2.0, -1.0],
        [[9.0, 9.0]] * 2,
        num_groups=1.0,
        group_actions=torch.tensor([3.0, 3.0]),
    )
    for normaliser, loss in (
        ("token", 5 / 3),
        ("sequence", (3 - 1) / 2),
        ("group", 5 / 3),
        ("rows", 5 / 2),
        ("groups", 5),
    ):
        out = LOSSES["reinforce"](normaliser=normaliser)(logps, data)
        assert out.loss.item() == pytest.approx(loss, abs=1e-12), normaliser
    assert not LOSSES["reinforce"]().uses_old and not LOSSES["reinforce"]().uses_ref
    assert LOSSES["reinforce"](kl_coef=0.1, kl_to="old").uses_old


@pytest.mark.parametrize(
    ("delta", "advantage", "gain", "slope"),
    [
        (0.1, 1.0, 1.1, 1.0),  # linear where A > 0
        (0.5, 1.0, 1.2, 0.0),  # clipped above
        (-3.0, 1.0, -2.0, 1.0),  # the bound may fall below 0
        (0.1, -1.0, -exp(0.1), -exp(0.1)),  # exponential where A < 0
        (-0.5, -1.0, -0.8, 0.0),  # clipped below
        (2.0, -1.0, -3.0, 0.0),  # dual clip
    ],
)
def test_linear_bound_by_hand(delta: float, advantage: float, gain: float, slope: float) -> None:
    logps = torch.tensor([[delta, delta]], dtype=torch.float64, requires_grad=True)
    out = linear_bound()(logps, batch([[1, 1]], [advantage], [[0.0, 0.0]]))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-gain, abs=1e-12)
    assert logps.grad.tolist() == [pytest.approx([-slope / 2, -slope / 2], abs=1e-12)]
    assert float(out.metrics["ratio/clip_frac"]) == (slope == 0)
    # below the unclipped sequence objective on either side
    assert -out.loss.item() <= max(exp(delta) * advantage, -3.0 if advantage < 0 else -9.0) + 1e-12


def test_the_clip_range_is_the_nearer_end_in_nats() -> None:
    assert token_clip(clip_low=0.3, clip_high=0.2).clip_range == pytest.approx(log(1.2))
    assert sequence_clip(clip_low=0.1, clip_high=0.2).clip_range == pytest.approx(-log(0.9))
    # an end at 0 is no width
    assert linear_bound(clip_low=0.0, clip_high=0.2).clip_range == pytest.approx(log(1.2))
    assert (
        token_clip(clip_low=0.0, clip_high=0.0).clip_range
        == LOSSES["reinforce"]().clip_range
        == float("inf")
    )
