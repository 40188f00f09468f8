"""A device without float64, such as Apple's: decoding makes no such number and gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import seeded, tiny_llada
from unmaskrl.core import precision
from unmaskrl.core.canvas import anchored_canvas
from unmaskrl.core.decoding import RULES, decode, planned_calls
from unmaskrl.core.rng import counter_uniform
from unmaskrl.core.threshold_head import ThresholdHead, best_gamma
from unmaskrl.core.types import Rollout
from unmaskrl.models.loading import load


class NoFloat64(TorchDispatchMode):
    """Refuses whatever would be a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func}: float64")
        return result


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoFloat64]:
    """The CPU as a device without float64."""
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    yield NoFloat64()


def decoded(select: str, temperature: float, exit_at: float | None, head: bool) -> Rollout:
    denoiser = tiny_llada(torch.float32)
    canvas = anchored_canvas(
        [[1, 2, 3], [4], [5, 6], [7]],
        [{}, {0: 3, 4: 1}, {2: 2}, {}],
        gen_length=12,
        denoiser=denoiser,
    )
    gamma = None
    if RULES[select].prefix is not None:
        gamma = best_gamma(ThresholdHead(16), canvas.prompt_mask) if head else 0.3
    return decode(
        denoiser,
        canvas,
        block_length=6,
        steps=8,
        select=select,
        temperature=temperature,
        exit_at=exit_at,
        gamma=gamma,
        generator=seeded(5),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("select", "head"),
    [*((name, False) for name in RULES), *((name, True) for name in RULES if RULES[name].prefix)],
)
def test_decoding_without_float64_gives_the_same(
    select: str,
    head: bool,
    temperature: float,
    without_float64: NoFloat64,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with without_float64:
        coarse = decoded(select, temperature, 0.7, head)
    assert coarse.gamma.dtype == torch.float32
    monkeypatch.undo()
    fine = decoded(select, temperature, 0.7, head)
    assert fine.gamma.dtype == torch.float64
    for name in ("ids", "decoded_step", "nfe", "exit_step"):
        assert torch.equal(getattr(coarse, name), getattr(fine, name)), name
    assert torch.equal(coarse.behavior_logps, fine.behavior_logps)


def test_the_mode_refuses_what_the_device_would(without_float64: NoFloat64) -> None:
    with without_float64, pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()


def test_uniforms_in_float32_lie_strictly_inside_and_near_the_fine_ones(
    without_float64: NoFloat64, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = torch.arange(200_000)
    with without_float64:
        coarse = counter_uniform(7, keys)
    monkeypatch.undo()
    fine = counter_uniform(7, keys)
    assert coarse.dtype == torch.float32 and fine.dtype == torch.float64
    assert float(coarse.min()) > 0 and float(coarse.max()) < 1
    # both lie in the same of 2**23 cells, the coarse one in its middle
    assert float((coarse.double() - fine).abs().max()) <= 2.0**-24


@pytest.mark.parametrize("exit_at", [0.1, 0.3, 0.55, 0.7, 0.95])
def test_the_exit_is_where_the_plan_has_it(exit_at: float, without_float64: NoFloat64) -> None:
    """ceil(exit_at * f) for every f, without float64 too: 0.7 * 10 is 7."""
    with without_float64:
        rollout = decoded("left_to_right", 0.0, exit_at, False)
    ended = rollout.ids[:, -12:] == 12
    for row in range(4):
        if bool(ended[row].any()):  # an EOS ends the row early
            continue
        fixed = rollout.anchor_mask[row, -12:]
        open_per_block = [6 - int(fixed[:6].sum()), 6 - int(fixed[6:].sum())]
        assert int(rollout.nfe[row]) == planned_calls(open_per_block, 12, 8, exit_at)


def test_weights_in_float64_are_refused_where_there_is_none(
    without_float64: NoFloat64,
) -> None:
    with pytest.raises(ValueError, match="dtype: cpu has no float64; use float32 or bfloat16"):
        load("mini", device="cpu", dtype="float64")
