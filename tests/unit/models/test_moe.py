"""Experts: the choice against written-out rules, the sum against all experts, gradients, precision,
adapters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import same_maths, seeded
from tests.unit.models.block_models import random_ids, small_model
from unmaskrl.models.adapters import add_lora, linear_names, lora_layers
from unmaskrl.models.families.common import SwiGLU
from unmaskrl.models.families.moe import (
    Mixture,
    Router,
    grouped_sigmoid_choice,
    softmax_choice,
)

MOE = ("sdar_moe", "llada2_moe")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_softmax_choice_by_hand() -> None:
    logits = draw(20, 7)
    for renormalise in (True, False):
        chosen, weights = softmax_choice(logits, 3, renormalise)
        for row in range(20):
            probs = [float(x) for x in logits[row].softmax(-1)]
            best = sorted(range(7), key=lambda e: -probs[e])[:3]
            assert chosen[row].tolist() == best
            total = sum(probs[e] for e in best) if renormalise else 1.0
            assert same_maths(weights[row], doubles([probs[e] / total for e in best]))


def test_the_grouped_choice_by_hand() -> None:
    logits = 2 * draw(50, 12)
    bias = draw(12, seed=1) / 2
    chosen, weights = grouped_sigmoid_choice(logits, bias, 4, 4, 2, 2.5)
    limited = changed = 0
    for row in range(50):
        score = [1 / (1 + 2.718281828459045**-x) for x in logits[row].tolist()]
        biased = [s + float(b) for s, b in zip(score, bias, strict=True)]
        groups = [biased[3 * g : 3 * g + 3] for g in range(4)]
        best = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        want = sorted(allowed, key=lambda e: -biased[e])[:4]
        assert chosen[row].tolist() == want
        shares = doubles([score[e] for e in want])
        assert same_maths(weights[row], 2.5 * shares / shares.sum())
        limited += set(want) != set(sorted(range(12), key=lambda e: -biased[e])[:4])
        changed += set(want) != set(sorted(allowed, key=lambda e: -score[e])[:4])
    assert limited and changed  # both rules matter for these numbers


def mixture(shared: int = 1, bias: bool = True) -> Mixture:
    choose: Any = partial(grouped_sigmoid_choice, top=2, groups=4, top_groups=2, factor=2.5)
    if not bias:
        choose = partial(softmax_choice, top=2, renormalise=True)
    made = Mixture(6, 5, 16, Router(6, 16, choose, bias=bias), shared).double()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i))
    return made


@pytest.fixture
def built() -> Mixture:
    with torch.random.fork_rng():  # linear layers draw as they are made
        return mixture()


def test_the_sum_is_that_of_the_chosen_experts(built: Mixture) -> None:
    x = draw(3, 4, 6)
    y = built(x)
    chosen, weights = built.gate(x.flatten(0, 1))
    assert built.shared_experts is not None
    for i, token in enumerate(x.flatten(0, 1)):
        want = built.shared_experts(token)
        for e, w in zip(chosen[i].tolist(), weights[i], strict=True):
            want = want + w * built.experts[e](token)
        assert same_maths(y.flatten(0, 1)[i], want)
    with torch.no_grad():
        assert built(x[:, :0]).shape == (3, 0, 6)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_the_used_experts_and_are_zero_elsewhere(
    built: Mixture, training: bool
) -> None:
    x = draw(3, 6)
    built.train(training)
    built(x).pow(2).sum().backward()
    used = set(built.gate(x)[0].flatten().tolist())
    assert 0 < len(used) < 16
    for e, expert in enumerate(built.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (e in used)
    assert built.gate.weight.grad is not None and bool(built.gate.weight.grad.any())


def test_experts_without_tokens_are_not_run(
    built: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = draw(3, 6)
    ran = []
    forward = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: ran.append(len(x)) or forward(self, x))
    with torch.no_grad():
        built(x)
    used = set(built.gate(x)[0].flatten().tolist())
    assert len(ran) == len(used) + 1 and min(ran) > 0  # and the shared one


def test_choices_are_made_in_float32_whatever_the_weights_are(built: Mixture) -> None:
    built.bfloat16()
    bias = built.gate.expert_bias
    assert bias is not None and bias.dtype == torch.float32
    bias += 7  # rounded to bfloat16 the scores would be lost in it
    x = draw(3000, 6).bfloat16()
    chosen, weights = built.gate(x)
    assert weights.dtype == torch.float32
    logits = x.double() @ built.gate.weight.double().T
    want, _ = grouped_sigmoid_choice(logits, bias.double(), 2, 4, 2, 2.5)
    same = (chosen.sort(-1).values == want.sort(-1).values).all(-1).double().mean()
    assert same > 0.999
    assert built.half().gate.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("family", MOE)
def test_adapters_sit_on_the_attention_and_nothing_else_learns(family: str) -> None:
    model = small_model(family)
    names = linear_names(model)
    assert not any(name.endswith(".gate") for name in names)
    chosen = add_lora(model, seeded(), rank=2, alpha=2.0)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    path = "self_attn"
    if family == "llada2_moe":
        kinds = ("query_key_value", "dense")
        path = "attention"
    assert sorted(chosen) == sorted(f"model.layers.{i}.{path}.{k}" for i in range(2) for k in kinds)
    model.hidden(random_ids(2, 6)).sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt and all(".lora_" in name for name in learnt)
    assert all(bool(layer.lora_B["default"].weight.grad.any()) for _, layer in lora_layers(model))


def test_named_targets_never_adapt_experts() -> None:
    model = small_model("llada2_moe")
    chosen = add_lora(model, seeded(), rank=2, alpha=2.0, targets=["up_proj"])
    assert chosen == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"]
    with pytest.raises(ValueError, match="no linear layer is called 'gate'"):
        add_lora(small_model("llada2_moe"), seeded(), rank=2, alpha=2.0, targets=["gate"])


@pytest.mark.parametrize("family", MOE)
def test_blocks_are_the_layers_and_not_the_experts(family: str) -> None:
    model = small_model(family)
    assert len(model.blocks) == 2 and model.config.n_experts > 2
