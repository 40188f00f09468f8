"""How often a decoding would wait for a GPU, counted on a CPU by its operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.block_rows import PROMPTS, toy
from tests.conftest import QUOTA_RULES, seeded, tiny_llada
from unmaskrl.core.canvas import anchored_canvas, blank_canvas
from unmaskrl.core.decoding import decode, sample
from unmaskrl.core.decoding.plan import places
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.types import Canvas

# their results have sizes, or are numbers, that the host must know
WAITING = {
    "nonzero",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "item",
    "masked_select",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
}
INDEXING = {"index", "index_put", "index_put_"}


class Waits(TorchDispatchMode):
    """Operators at which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        to_host = name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")
        if name in WAITING or by_mask or sized or to_host:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """``tolist`` reads a CPU tensor without an operator."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist or func is Tensor.numpy:
            self.waits.count["tolist"] += 1
        return func(*args, **(kwargs or {}))


class Between:
    """A denoiser that notes how often the host has waited when each of its calls begins."""

    def __init__(self, inner: Any, waits: Waits) -> None:
        self.inner = inner
        self.waits = waits
        self.noted: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, *given: Any) -> Tensor:
        self.noted.append(self.waits.count.total())
        return self.inner.hidden(*given)

    def hidden_under(self, *given: Any) -> Tensor:
        self.noted.append(self.waits.count.total())
        return self.inner.hidden_under(*given)


def per_call(denoiser: Denoiser, canvas: Canvas, **settings: Any) -> list[int]:
    """Waits from the beginning of each call to that of the next."""
    waits = Waits()
    between: Any = Between(denoiser, waits)
    with Lists(waits), waits:
        decode(between, canvas, generator=seeded(3), **settings)
    assert len(between.noted) >= 3
    return [b - a for a, b in zip(between.noted, between.noted[1:], strict=False)]


def canvas_of(denoiser: Denoiser) -> Canvas:
    anchors = [{}, {0: 1, 5: 2, 6: 1}, dict.fromkeys(range(4), 1)]
    return anchored_canvas([[1, 2], [3], [4, 5, 6]], anchors, gen_length=12, denoiser=denoiser)


@pytest.mark.parametrize("stop_at_eos", [True, False])
@pytest.mark.parametrize("exit_at", [None, 0.6])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("select", QUOTA_RULES)
def test_a_call_with_a_quota_waits_once(
    select: str, temperature: float, exit_at: float | None, stop_at_eos: bool
) -> None:
    """Left pads, anchors, rows that end at different calls."""
    denoiser = tiny_llada(torch.float32)
    found = per_call(
        denoiser,
        canvas_of(denoiser),
        block_length=4,
        steps=7,
        select=select,
        temperature=temperature,
        exit_at=exit_at,
        stop_at_eos=stop_at_eos,
    )
    assert found == [1] * len(found)


@pytest.mark.parametrize("stop_at_eos", [True, False])
@pytest.mark.parametrize("select", ["confidence", "random", "entropy"])
def test_a_block_causal_call_waits_once(select: str, stop_at_eos: bool) -> None:
    denoiser = toy(3, eos_id=0)
    canvas = blank_canvas(PROMPTS, gen_length=9, denoiser=denoiser)
    found = per_call(
        denoiser,
        canvas,
        block_length=3,
        steps=7,
        select=select,
        temperature=1.0,
        stop_at_eos=stop_at_eos,
    )
    assert found == [1] * len(found)


@pytest.mark.parametrize("select", ["eb", "confidence_threshold"])
def test_an_adaptive_call_waits_twice(select: str) -> None:
    """Once more, for how many tokens its statistic lets it reveal."""
    denoiser = tiny_llada(torch.float32)
    canvas = canvas_of(denoiser)
    found = per_call(denoiser, canvas, block_length=4, steps=12, select=select, gamma=0.5)
    assert found == [2] * len(found)


def test_the_count_sees_every_kind_of_wait() -> None:
    waits = Waits()
    x = torch.tensor([1, 0, 2])
    with Lists(waits), waits:
        for wait in (
            x.nonzero,
            x.unique,
            x.tolist,
            x[0].item,
            lambda: bool(x.any()),
            lambda: int(x.max()),
            lambda: x[x > 0],
            lambda: x.masked_fill_(x > 5, 0)[x == 0],
            lambda: x.clone().__setitem__(x > 0, x[:2]),
            lambda: x.repeat_interleave(x),
        ):
            before = waits.count.total()
            wait()
            assert waits.count.total() == before + 1, waits.count


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 0)])
def test_places_are_those_of_nonzero(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=seeded(1)) < 0.4
    expected = mask.nonzero(as_tuple=True)
    found = places(mask, int(mask.sum()))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_chunks_grow_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes an element, 1/128 of the card; never below the CPU's."""
    gib = 2**30

    class Card:
        total_memory = 80 * gib

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert sample.chunk_elements(torch.device("cpu")) == sample.CHUNK_ELEMENTS
    assert sample.chunk_elements(torch.device("cuda", 0)) * 16 == 80 * gib // 128
    Card.total_memory = 4 * gib
    assert sample.chunk_elements(torch.device("cuda", 0)) == sample.CHUNK_ELEMENTS
