"""Noise of the log-ratio, bias and variance of GRPO's gain and gradient (docs/theory.md 4):
quadrature and enumeration.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.exact import conditional_logps, elbo_outcomes, moments
from tests.conftest import seeded, train_batch
from unmaskrl.core.losses import token_clip

LENGTH = 4
NUM_TOKENS = 3
ALL = range(LENGTH)
VARIANCES = [0.01, 0.1, 0.5, 1.0]


def normal_nodes(count: int = 30) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal: eigenvalues of the Hermite recurrence (Golub and
    Welsch).
    """
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def gain(log_ratio: float, advantage: float, **clip: float) -> float:
    """What token_clip maximises, for one token."""
    one = torch.ones(1, 1, dtype=torch.bool)
    logps = torch.full((1, 1), log_ratio, dtype=torch.float64)
    batch = train_batch(
        one, torch.tensor([advantage], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    )
    return -float(token_clip(kl_coef=0.0, **clip)(logps, batch).loss)


def gain_moments(w: float, v: float, advantage: float, **clip: float) -> tuple[float, float]:
    """Mean and variance of the gain when the log-ratio log w has Gaussian noise of variance v."""
    nodes, weights = normal_nodes()
    values = torch.tensor(
        [gain(math.log(w) + math.sqrt(v) * float(x), advantage, **clip) for x in nodes],
        dtype=torch.float64,
    )
    mean = (weights * values).sum()
    return float(mean), float((weights * (values - mean) ** 2).sum())


def squared_error(v: float) -> float:
    """E[(w_hat / w - 1)^2] = e^{2v} - 2 e^{v/2} + 1."""
    return math.exp(2 * v) - 2 * math.exp(v / 2) + 1


@pytest.mark.parametrize("v", VARIANCES)
@pytest.mark.parametrize("w", [0.7, 1.0, 1.3])
def test_without_clip_bias_and_variance_are_the_log_normal_ones(w: float, v: float) -> None:
    """Bias A w (e^{v/2} - 1), variance A^2 w^2 (e^{2v} - e^v), by the loss itself."""
    advantage = 1.5
    mean, variance = gain_moments(w, v, advantage, clip_low=0.999, clip_high=1e9)
    assert mean - advantage * w == pytest.approx(advantage * w * math.expm1(v / 2), rel=1e-6)
    assert variance == pytest.approx(
        (advantage * w) ** 2 * (math.exp(2 * v) - math.exp(v)), rel=1e-4
    )


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("v", VARIANCES)
@pytest.mark.parametrize("w", [0.7, 0.9, 1.0, 1.15, 1.3])
def test_with_clip_both_are_bounded_and_the_bounds_grow_with_v(
    w: float, v: float, advantage: float
) -> None:
    """The clipped gain is |A|-Lipschitz in w: |bias|^2 + variance = E(error^2) <= A^2 w^2 (e^{2v} -
    2 e^{v/2} + 1).
    """
    mean, variance = gain_moments(w, v, advantage)
    bias = mean - gain(math.log(w), advantage)
    assert bias**2 + variance <= (advantage * w) ** 2 * squared_error(v) * (1 + 1e-9)
    for bound in (
        lambda u: math.expm1(u / 2),
        lambda u: math.exp(2 * u) - math.exp(u),
        squared_error,
    ):
        assert 0 < bound(v) < bound(1.01 * v)


def test_the_clip_can_turn_the_bias_around() -> None:
    """A > 0, w = 1: without clip noise inflates the gain; with it the upper tail is cut and the
    gain shrinks, to e^{v/2} Phi((k - v) / s) + e^k Phi(-k / s) with k = ln 1.2, s = sqrt v.
    """
    v = 0.5
    k = math.log(1.2)
    phi = [0.5 * (1 + math.erf(x / math.sqrt(2 * v))) for x in (k - v, -k)]
    clipped = math.exp(v / 2) * phi[0] + math.exp(k) * phi[1]
    assert clipped < 0.9
    # quadrature across a kink
    assert gain_moments(1.0, v, 1.0)[0] == pytest.approx(clipped, abs=0.03)
    assert gain_moments(1.0, v, 1.0, clip_low=0.999, clip_high=1e9)[0] > 1.2


@pytest.mark.parametrize("v", VARIANCES)
@pytest.mark.parametrize("correlation", [-1.0, -0.5, 0.0, 0.8, 1.0])
def test_gradient_bias_is_bounded_for_gaussian_noise(v: float, correlation: float) -> None:
    """delta and grad eps jointly Gaussian: bias = w [(e^{v/2} - 1) grad l + e^{v/2} Cov(delta, grad
    eps)], below w [(e^{v/2} - 1)|grad l| + sqrt((e^{2v} - e^v) E|grad eps|^2)]; e^v sqrt(E|grad
    eps|^2) would not vanish with v.
    """
    nodes, weights = normal_nodes()
    grad = 0.8
    noise_sd = 1.7
    # grad eps = slope * delta + an independent part of mean 0
    slope = correlation * noise_sd / math.sqrt(v)
    delta = math.sqrt(v) * nodes
    bias = float((weights * (delta.exp() * (grad + slope * delta))).sum()) - grad
    want = math.expm1(v / 2) * grad + math.exp(v / 2) * correlation * noise_sd * math.sqrt(v)
    assert bias == pytest.approx(want, rel=1e-7, abs=1e-9)
    bound = math.expm1(v / 2) * grad + math.sqrt((math.exp(2 * v) - math.exp(v)) * noise_sd**2)
    assert abs(bias) <= bound <= math.expm1(v / 2) * grad + math.exp(v) * noise_sd


def policies(step: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Old log-weights (with gradient), those after a drift of ``step``, and the direction."""
    generator = seeded(seed)
    weights, direction = torch.randn(
        2, NUM_TOKENS**LENGTH, generator=generator, dtype=torch.float64
    )
    return weights, (weights + step * direction).requires_grad_(), direction


def draws(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities, values (D, N)) of one ELBO draw, tokens all free."""
    outcomes = elbo_outcomes(conditional_logps(weights, NUM_TOKENS, LENGTH), ALL)
    return torch.tensor([p for p, _ in outcomes], dtype=torch.float64), torch.stack(
        [v for _, v in outcomes]
    )


def variance(probs: Tensor, values: Tensor) -> Tensor:
    centred = values - probs @ values
    return probs @ centred**2


def test_noise_of_shared_masks_is_0_at_the_old_policy_and_grows_with_the_drift_squared() -> None:
    """v_shared = Var(X_new - X_old) = v_new + v_old - 2 Cov; 0 at no drift, times 4 as a small
    drift doubles. Independent masks: v_new + v_old, which drift hardly moves.
    """
    old = draws(policies(0.0)[0])[1]
    shared = {}
    apart = {}
    for step in (0.0, 0.005, 0.01, 0.02, 0.04):
        probs, new = draws(policies(step)[1].detach())
        shared[step] = variance(probs, new - old).mean()
        apart[step] = (variance(probs, new) + variance(probs, old)).mean()
        covariance = probs @ ((new - probs @ new) * (old - probs @ old))
        assert torch.allclose(
            variance(probs, new - old).mean(), apart[step] - 2 * covariance.mean(), atol=1e-9
        )
    assert shared[0.0] == 0 and float(apart[0.0]) > 1
    for small, large in ((0.005, 0.01), (0.01, 0.02), (0.02, 0.04)):
        assert float(shared[large] / shared[small]) == pytest.approx(4.0, rel=0.1)
        assert float(apart[large] / apart[small]) == pytest.approx(1.0, rel=0.05)
        assert shared[large] < 0.01 * apart[large]


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_bounds_that_need_no_gaussian_noise(step: float) -> None:
    """Real mask noise, enumerated: E[w_hat] >= w (Jensen), and the gradient's bias is at most
    |E w_hat - w| |grad l| + sd(w_hat) sqrt(E|grad eps|^2), for shared and for independent masks."""
    weights, new_weights, _ = policies(step)
    probs, old = draws(weights)
    _, new = draws(new_weights)
    for y in (0, 17, 40, 80):
        grads = torch.stack(
            [torch.autograd.grad(value[y], new_weights, retain_graph=True)[0] for value in new]
        )
        grad = probs @ grads
        noise = grads - probs @ grads
        log_w = probs @ (new - old)[:, y].detach()
        ratio = (new - old)[:, y].detach().exp()
        other = probs @ (-old[:, y]).exp()  # E exp(-l_old) of masks of its own
        for w_hat in (ratio, new[:, y].detach().exp() * other):
            w = log_w.exp()
            mean = probs @ w_hat
            assert mean >= w * (1 - 1e-12)
            bias = (probs * w_hat) @ grads - w * grad
            spread = (probs @ (w_hat - mean) ** 2).sqrt() * (probs @ (noise**2).sum(-1)).sqrt()
            assert bias.norm() <= (mean - w) * grad.norm() + spread + 1e-12
            assert bias.norm() > 1e-4


def test_anchors_and_exits_lower_the_noise_of_independent_masks() -> None:
    """v_new + v_old over all completions of a joint: all tokens > two given > two given and one
    left to the exit.
    """
    totals = []
    for free, exits in ((ALL, ()), ((0, 1), ()), ((0,), (1,))):
        tables = [conditional_logps(w.detach(), NUM_TOKENS, LENGTH) for w in policies(0.3)[:2]]
        totals.append(sum(float(moments(elbo_outcomes(t, free, exits))[1].mean()) for t in tables))
    assert totals[0] > totals[1] > totals[2] == pytest.approx(0.0, abs=1e-12)
