"""State of any optimiser goes into a checkpoint and comes back; norms and biases do not decay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unmaskrl.recipes.optimizers import make_optimizer, state_share
from unmaskrl.recipes.schema import OptimizerConfig
from unmaskrl.training.folder.optimizer_state import (
    check_state,
    load_optimizer,
    optimizer_numbers,
    optimizer_tensors,
)

OPTIMIZERS = [
    {"name": "adamw", "weight_decay": 0.1},
    {"name": "torch.optim:SGD"},
    {"name": "torch.optim:SGD", "momentum": 0.9, "nesterov": True},
    {"name": "torch.optim:NAdam"},
    {"name": "torch.optim:Adafactor"},
    {"name": "torch.optim:Rprop"},
    {"name": "torch.optim:ASGD"},
    {"name": "torch.optim:AdamW", "amsgrad": True},
    {"name": f"{__file__}:Counting"},
]


class Counting(torch.optim.Optimizer):
    """Plain descent that slows down by counts of its own: of the group, and of each parameter."""

    def __init__(self, parameters, lr: float, slowdown: float = 0.5) -> None:
        super().__init__(parameters, {"lr": lr, "slowdown": slowdown, "steps": 0})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                seen = self.state[parameter].get("seen", 0)
                self.state[parameter]["seen"] = seen + 1
                rate = group["lr"] / (1 + group["slowdown"] * (group["steps"] + seen))
                parameter -= rate * parameter.grad


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.sin(torch.arange(10.0).reshape(2, 5) + step)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_training_goes_on_as_if_it_had_not_been_left(settings: dict, tmp_path: Path) -> None:
    config = OptimizerConfig(lr=0.01, **settings)
    whole = model()
    descend(whole, make_optimizer(config, whole.parameters()), range(6))
    left = model()
    optimizer = make_optimizer(config, left.parameters())
    descend(left, optimizer, range(3))
    save_file(optimizer_tensors(left, optimizer), tmp_path / "optimizer.safetensors")
    numbers = json.loads(json.dumps(optimizer_numbers(left, optimizer)))
    tensors = load_file(tmp_path / "optimizer.safetensors")

    again = model()
    again.load_state_dict(left.state_dict())
    optimizer = make_optimizer(config, again.parameters())
    check_state("optimizer", config, dict(again.named_parameters()), tensors, numbers)
    load_optimizer(again, optimizer, tensors, numbers)
    descend(again, optimizer, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_state_of_another_optimiser_or_model_does_not_fit() -> None:
    net = model()
    config = OptimizerConfig()
    optimizer = make_optimizer(config, net.parameters())
    descend(net, optimizer, range(1))
    tensors = optimizer_tensors(net, optimizer)
    numbers = optimizer_numbers(net, optimizer)
    parameters = dict(net.named_parameters())
    check_state("optimizer", config, parameters, tensors, numbers)
    sgd = OptimizerConfig(name="torch.optim:SGD", momentum=0.9)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="no state of the recipe's model"):
        check_state("optimizer", sgd, parameters, tensors, numbers)
    with pytest.raises(ValueError, match="no state of the recipe's model"):
        check_state("optimizer", config, {"other": net[0].weight}, tensors, numbers)
    tensors["0.weight/exp_avg"] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"0.weight/exp_avg of shape \(4, 4\), expected \(4, 5\)"):
        check_state("optimizer", config, parameters, tensors, numbers)


def test_norms_and_biases_do_not_decay() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(config, net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in net.state_dict().items():
        shrunk = before[name] * (0.95 if value.ndim > 1 else 1.0)
        torch.testing.assert_close(value, shrunk)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 2.0),
        ({"name": "torch.optim:SGD"}, 0.0),
        ({"name": "torch.optim:SGD", "momentum": 0.9}, 1.0),
        ({"name": "torch.optim:AdamW", "amsgrad": True}, 3.0),
        ({"name": "torch.optim:Adafactor"}, 2 / 64),
    ],
    ids=str,
)
def test_state_is_counted_by_asking_the_optimiser(settings: dict, share: float) -> None:
    assert state_share(OptimizerConfig(**settings)) == share


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "torch.optim:LBFGS"}, "optimizer torch.optim:LBFGS: a step failed"),
        ({"name": "torch.optim:Nope"}, "torch.optim has no 'Nope'"),
        ({"name": "torch.nn:Linear"}, r"optimizer torch.nn:Linear|has no such setting|gave a"),
        ({"nesterov": True}, "optimizer.nesterov: adamw has no such setting"),
        ({"betas": 3}, "wrong type"),
        ({"betas": [0.9, 1.5]}, "Invalid beta parameter"),
        ({"params": []}, "optimizer.params: adamw has no such setting"),
    ],
    ids=str,
)
def test_what_cannot_be_an_optimiser_is_one_line(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        state_share(OptimizerConfig(**settings))
    assert "\n" not in str(error.value)
