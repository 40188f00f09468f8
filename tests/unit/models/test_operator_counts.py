"""What a GPU would run, counted on a CPU: operators on whole activations in float32, kernels of a
block.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import seeded
from unmaskrl.models.adapters import add_lora
from unmaskrl.models.families import FAMILIES, MaskPredictor
from unmaskrl.models.families.common import RMSNorm
from unmaskrl.models.weights import trainable

ROWS, LENGTH, RANK = 8, 48, 4
IDS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 200
PADS = torch.arange(LENGTH) >= torch.arange(ROWS)[:, None]
KEYS = 16  # the narrowest of a block's activations: one key head of the tiny models


class Operators(TorchDispatchMode):
    """Kernels outside the norms, which count as one kernel each; views and allocations are none."""

    def __init__(self, model: MaskPredictor) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.wide: list[str] = []  # those that read or write a whole activation in float32 or more
        self.in_norm = False
        for norm in (m for m in model.modules() if isinstance(m, RMSNorm)):
            norm.register_forward_pre_hook(self._enter)
            norm.register_forward_hook(self._leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        view = all(t.untyped_storage().data_ptr() in storages for t in made)
        if self.in_norm or (view and not func._schema.is_mutable) or "empty" in str(func):
            return result
        self.kernels.append(str(func))
        if any(
            t.dtype in (torch.float32, torch.float64) and t.numel() >= ROWS * LENGTH * KEYS
            for t in (*given, *made)
        ):
            self.wide.append(str(func))
        return result

    def _enter(self, *_: Any) -> None:
        self.in_norm = True

    def _leave(self, *_: Any) -> None:
        self.in_norm = False
        self.kernels.append("norm")


def tiny(family: str, *, lora: bool, blocks: int = 2) -> MaskPredictor:
    """A random bfloat16 model; adapters as after some training."""
    one = FAMILIES[family]
    raw = dict(one.released or {})
    config: Any = one.read(raw).tiny().with_vocabulary(200, 199, 198, 198)
    config = type(config).from_dict(config.to_dict() | {config.key("n_layers"): blocks})
    model = one.build(config).init_weights(seeded()).to(torch.bfloat16)
    if lora:
        add_lora(model, seeded(1), rank=RANK, alpha=4.0)
    return model


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mask", [None, PADS], ids=["no pads", "left pads"])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_nothing_of_full_size_is_float32(family: str, mask: Tensor | None, lora: bool) -> None:
    """In a pass without gradient, but for what norms do inside."""
    model = tiny(family, lora=lora)
    counted = Operators(model)
    with torch.no_grad(), counted:
        model.hidden(IDS, mask)
    assert counted.wide == [] and len(counted.kernels) > 20


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_nor_in_the_backward_pass(
    family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters; norms, whose backward would count, only scale here."""
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x * self.weight)
    model = tiny(family, lora=True)
    model.recompute = recompute
    counted = Operators(model)
    with counted:
        hidden = model.hidden(IDS, PADS)
        hidden.backward(torch.ones_like(hidden))
    assert counted.wide == []
    assert all(p.grad is not None for p in trainable(model).values())


@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize(("lora", "most"), [(False, 20), (True, 58)])
def test_kernels_of_a_block(family: str, lora: bool, most: int) -> None:
    """One more block costs so many: 7 products, 6 for the rotation, 2 norms, attention, SwiGLU's 2,
    2 residuals. 7 adapters: 4 for B each, and for A of four inputs 2, or 3 where layers share it.
    """
    counts = []
    for blocks in (2, 3):
        model = tiny(family, lora=lora, blocks=blocks)
        with torch.no_grad():
            model.hidden(IDS)  # the rotation's table is made once
            with Operators(model) as counted:
                model.hidden(IDS)
        counts.append(len(counted.kernels))
    assert counts[1] - counts[0] == most
