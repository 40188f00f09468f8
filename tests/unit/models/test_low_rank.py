"""Adapters in the model's dtype with masters in float32: the same training as plain mathematics,
and nothing of full size in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import same_maths, seeded, tiny_llada
from unmaskrl.models.adapters import adapters_merged, adapters_off, add_lora, lora_layers
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.low_rank import LowRankLinear, linears
from unmaskrl.models.weights import trainable

N_IN, N_OUT, RANK = 48, 40, 8
SCALE = 0.75  # no power of two


def drawn(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 holds exactly."""
    return (size * torch.randn(shape, generator=seeded(seed))).bfloat16().float()


def layer(dtype: torch.dtype, outputs: int = N_OUT, seed: int = 0) -> LowRankLinear:
    base = nn.Linear(N_IN, outputs, bias=False, device="meta")
    base.weight = nn.Parameter(drawn(outputs, N_IN, seed=seed, size=0.1).to(dtype), False)
    a = drawn(RANK, N_IN, seed=seed + 1, size=N_IN**-0.5)
    return LowRankLinear(base, a, torch.zeros(outputs, RANK), SCALE)


def plain(one: LowRankLinear, x: Tensor) -> Tensor:
    """W x + scale B (A x) as it is written, in float32."""
    base = x.float() @ one.base_layer.weight.float().T
    return base + SCALE * (x.float() @ one.a.T @ one.b.T)


def train(one: LowRankLinear, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """20 AdamW steps; the gradients of B at each."""
    optimizer = torch.optim.AdamW([one.a, one.b], lr=1e-2, weight_decay=0.0)
    target = drawn(N_OUT, N_IN, seed=9, size=0.3)
    grads = []
    for step in range(20):
        x = drawn(64, N_IN, seed=100 + step)
        optimizer.zero_grad()
        (run(x).float() - x @ target.T).square().mean().backward()
        grads.append(one.b.grad.clone())
        assert {p.grad.dtype for p in (one.a, one.b)} == {torch.float32}
        optimizer.step()
    return grads


def off(got: Tensor, want: Tensor) -> float:
    return float(((got - want).norm() / want.norm()).detach())


def test_twenty_steps_in_float32_are_those_of_the_plain_formula() -> None:
    ours, theirs = layer(torch.float32), layer(torch.float32)
    train(ours, ours)
    train(theirs, lambda x: plain(theirs, x))
    assert same_maths(ours.a, theirs.a) and same_maths(ours.b, theirs.b)
    assert bool(ours.b.detach().norm() > 0.1), "nothing was learnt"


def test_twenty_steps_in_bfloat16_are_within_its_rounding() -> None:
    """Every gradient, and what is learnt, is off by less than bfloat16's eps of 2^-7, relative to
    float32's norm: each factor and each product is rounded once, by at most half of it.
    """
    ours, theirs = layer(torch.bfloat16), layer(torch.float32)
    got = train(ours, lambda x: ours(x.bfloat16()))
    want = train(theirs, lambda x: plain(theirs, x))
    assert ours.a.dtype == ours.b.dtype == torch.float32
    errors = [off(a, b) for a, b in zip(got, want, strict=True)]
    assert 0 < max(errors) < 2**-7, errors
    assert 0 < off(ours.b @ ours.a, theirs.b @ theirs.a) < 2**-7


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1), (0, 1, 2)])
def test_layers_that_read_the_same_are_what_they_are_alone(frozen: tuple[int, ...]) -> None:
    """Values and gradients; layers without an adapter, or with one that is off, among them."""
    grads = []
    for together in (True, False):
        layers: list[Any] = [layer(torch.float32, 40 + 8 * i, seed=20 + i) for i in range(3)]
        for one in layers:
            with torch.no_grad():
                one.b.add_(drawn(*one.b.shape, seed=5))
        for i in frozen:
            layers[i].enabled = False
        if frozen:
            layers[0] = layers[0].base_layer
        x = drawn(2, 7, N_IN, seed=4).requires_grad_()
        outputs = list(linears(x, *layers)) if together else [one(x) for one in layers]
        torch.stack([out.square().sum() for out in outputs]).sum().backward()
        grads.append([*outputs, x.grad, *(p.grad for one in layers for p in one.parameters())])
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        assert want is None or same_maths(got, want)


def test_masters_and_gradients_of_a_bfloat16_model_are_float32() -> None:
    model = tiny_llada(torch.bfloat16).model
    add_lora(model, seeded(), rank=2, alpha=4.0)
    model.hidden(torch.arange(24).reshape(2, 12) % 7).float().square().sum().backward()
    learning = trainable(model)
    assert len(learning) == 2 * 7 * model.config.n_layers
    for name, p in learning.items():
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32
        # A's gradient is 0 as long as B is
        assert bool(p.grad.any()) == (".lora_B." in name), name


def test_merged_adapters_cost_what_the_base_costs_and_leave_it_as_it_is() -> None:
    ids = torch.arange(24).reshape(2, 12) % 7
    denoiser = tiny_llada(torch.float64)
    base = denoiser.hidden(ids)
    plain = flops(denoiser, ids)
    add_lora(denoiser.model, seeded(), rank=3, alpha=6.0)
    for _, one in lora_layers(denoiser.model):
        nn.init.normal_(one.b, std=0.3, generator=seeded(1))
    kept = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    apart = denoiser.hidden(ids)
    assert flops(denoiser, ids) > 1.05 * plain
    with adapters_merged(denoiser.model):
        merged = denoiser.hidden(ids)
        assert flops(denoiser, ids) == plain
        with adapters_off(denoiser.model):
            assert torch.equal(denoiser.hidden(ids), base)
        assert denoiser.model.state_dict().keys() == kept.keys()
    assert same_maths(merged, apart) and off(merged, base) > 0.01
    assert torch.equal(denoiser.hidden(ids), apart)
    assert all(torch.equal(v, kept[n]) for n, v in denoiser.model.state_dict().items())


def test_a_merged_weight_is_the_sum_rounded_once() -> None:
    one = layer(torch.bfloat16)
    one.b.data = drawn(N_OUT, RANK, seed=4)
    with adapters_merged(nn.ModuleList([one])):
        assert one.merged is not None and torch.is_grad_enabled()
        wide = one.base_layer.weight.float() + SCALE * (one.b @ one.a)
        assert torch.equal(one.merged, wide.bfloat16())
        x = drawn(5, N_IN, seed=5).bfloat16()
        assert torch.equal(one(x), x @ one.merged.T)
    assert one.merged is None


def flops(denoiser: ModelDenoiser, ids: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        denoiser.hidden(ids)
    return counter.get_total_flops()
