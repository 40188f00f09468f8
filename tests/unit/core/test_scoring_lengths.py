"""Canvases of unlike lengths: short ones cost less, and every value and gradient stays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.conftest import same_maths, seeded, tiny_llada
from tests.unit.models.block_models import small
from unmaskrl.core import scoring
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.estimators import elbo, trajectory
from unmaskrl.core.scoring import backward_in_chunks, cuts, frozen_token_logps, token_logps
from unmaskrl.core.types import LossOutputs, Rollout
from unmaskrl.models.denoiser import ModelDenoiser

PROMPTS = [[1] * n for n in (3, 17, 4, 18, 3, 5)]


class Counted(ModelDenoiser):
    """Tokens of every pass."""

    shapes: ClassVar[list[tuple[int, int]]] = []

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.shapes.append((len(ids), ids.shape[1]))
        return super().hidden(ids, attention_mask)

    def hidden_under(self, ids: Tensor, *others: Any) -> Tensor:
        self.shapes.append((len(ids), ids.shape[1]))
        return super().hidden_under(ids, *others)


class Whole(Counted):
    """Its passes are made together with other ranks'."""

    @property
    def one_pass(self) -> bool:
        return True


def case(block: bool) -> tuple[ModelDenoiser, Any, Any, Any]:
    denoiser = small("sdar") if block else tiny_llada(torch.float64)
    canvas = blank_canvas(PROMPTS, gen_length=6 if block else 4, denoiser=denoiser)
    settings = {"block_length": 4, "steps": 6 if block else 4, "select": "entropy"}
    done = decode(denoiser, canvas, **settings, temperature=1.0, generator=seeded(7))
    estimator = trajectory() if block else elbo(num_mc=2)
    return denoiser, done, estimator, estimator.make_views(done, denoiser.mask_id, seeded(1))


def loss_and_gradients(denoiser: ModelDenoiser, *work: Any, limit: int) -> list[Tensor]:
    rollout, estimator, views = work

    def loss(logps: Tensor) -> LossOutputs:
        rows = torch.arange(1, len(logps) + 1, dtype=logps.dtype)
        return LossOutputs(loss=(logps.exp() * rows[:, None]).sum(), metrics={})

    out = backward_in_chunks(denoiser, rollout, estimator, views, loss, max_canvases=limit)
    grads = [p.grad.clone() for p in denoiser.model.parameters() if p.grad is not None]
    denoiser.model.zero_grad()
    return [out.loss, *grads]


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("limit", [3, 99])
def test_values_and_gradients_are_those_of_whole_canvases(
    block: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, *work = case(block)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_spans", uncut)
        plain = token_logps(denoiser, *work)
        want = loss_and_gradients(Whole.of(denoiser), *work, limit=99)
    monkeypatch.setattr(scoring, "CUT_TOKENS", 1)
    monkeypatch.setattr(Counted, "shapes", [])
    got = loss_and_gradients(Counted.of(denoiser), *work, limit=limit)
    largest = max(float(one.abs().max()) for one in want[1:])
    assert largest > 1e-3 and len(got) == len(want)
    assert all(same_maths(a, b, size=largest) for a, b in zip(got[1:], want[1:], strict=True))
    assert same_maths(got[0], want[0])
    assert same_maths(frozen_token_logps(denoiser, *work, max_canvases=limit), plain)
    lengths = {length for _, length in Counted.shapes}
    if block:  # they share clean halves instead
        return
    assert len(lengths) > 1 and min(lengths) < work[0].ids.shape[1] - 8


def uncut(rollout: Rollout, attention: Tensor) -> Tensor:
    return torch.tensor([[0, attention.shape[1]]]).expand(len(attention), -1)


def test_small_batches_and_those_of_several_ranks_are_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    denoiser, *work = case(False)
    monkeypatch.setattr(Counted, "shapes", [])
    token_logps(Counted.of(denoiser), *work)
    monkeypatch.setattr(scoring, "CUT_TOKENS", 1)
    token_logps(Whole.of(denoiser), *work)
    assert len(Counted.shapes) == 2 and Counted.shapes[0] == Counted.shapes[1]
    denoiser.model.cpu_chunk = None  # as shard_blocks leaves it
    assert denoiser.one_pass


@pytest.mark.parametrize(
    ("spans", "tokens", "want"),
    [
        ([(0, 10)] * 8, 1, [8]),
        ([(8, 10)] * 4 + [(0, 10)] * 4, 1, [4, 8]),
        ([(8, 10)] * 4 + [(0, 10)] * 4, 9, [8]),  # the first part has 8 tokens
        ([(9, 10)] * 2 + [(5, 10)] * 2 + [(0, 10)] * 2, 1, [2, 4, 6]),
        ([(1, 10)] + [(0, 10)] * 9, 1, [10]),  # one token of a hundred
        ([(0, 2)] * 4 + [(8, 10)] * 4, 1, [4, 8]),
        ([], 1, [0]),
    ],
)
def test_where_chunks_are_cut(
    spans: list[tuple[int, int]], tokens: int, want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CUT_TOKENS", tokens)
    assert cuts(spans) == want
    parts = [spans[a:b] for a, b in pairwise([0, *want])]
    assert sum(map(len, parts)) == len(spans)
