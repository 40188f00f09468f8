"""The toy against sums over its joint written as plain Python loops: everything else is tested on
top of it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.conftest import seeded
from unmaskrl.core.toy import ToyDenoiser


def conditional(toy: ToyDenoiser, visible: tuple[int, ...], position: int) -> list[float]:
    """p(x_position = v | visible tokens) by summing the joint; ``mask_id`` = not visible."""
    weights = dict(
        zip(map(tuple, toy.completions.tolist()), toy.log_weights.exp().tolist(), strict=True)
    )
    mass = [0.0] * toy.num_tokens
    for completion, weight in weights.items():
        if all(v in (toy.mask_id, c) for v, c in zip(visible, completion, strict=True)):
            mass[completion[position]] += weight
    return [m / sum(mass) for m in mass]


def test_conditionals_are_the_joint_summed() -> None:
    toy = ToyDenoiser.random(seeded(1), num_tokens=2, length=3)
    contexts = list(itertools.product(range(3), repeat=3))  # 2 is the mask
    ids = torch.tensor([[0, 1, *context] for context in contexts])
    probs = toy.logits(ids)[:, 2:].softmax(-1)
    assert toy.mask_id == 2 and toy.vocab_size == 4 and toy.eos_id == toy.pad_id == 3
    for row, context in enumerate(contexts):
        for position in range(3):
            assert probs[row, position].tolist() == pytest.approx(
                [*conditional(toy, context, position), 0, 0], abs=1e-12
            )


def test_chain_rule_holds_in_every_order_exactly_when_there_is_no_noise() -> None:
    generator = seeded(2)
    for noise, consistent in ((0.0, True), (0.5, False)):
        toy = ToyDenoiser.random(generator, num_tokens=3, length=3, noise=noise)
        sums = []
        for order in itertools.permutations(range(3)):
            total = 0.0
            visible = [toy.mask_id] * 3
            for position in order:
                logps = toy.logits(torch.tensor([[0, *visible]]))[0, 1:, :3].log_softmax(-1)
                total += float(logps[position, 1])
                visible[position] = 1
            sums.append(total)
        exact = float(toy.log_joint()[toy.completions.tolist().index([1, 1, 1])])
        assert (max(sums) - min(sums) < 1e-12) == consistent
        assert all(math.isclose(s, exact, abs_tol=1e-12) for s in sums) == consistent


def test_rows_and_prompts_do_not_matter_and_gradients_flow() -> None:
    weights = torch.randn(16, generator=seeded(3), dtype=torch.float64, requires_grad=True)
    toy = ToyDenoiser(weights, num_tokens=2, length=4, noise=0.3)
    ids = torch.tensor([[0, 2, 0, 2, 2], [1, 2, 1, 2, 0]])
    both = toy.logits(ids)
    assert torch.equal(both[1:], toy.logits(ids[1:]))
    assert torch.equal(both[:, 1:], toy.logits(torch.cat([1 - ids[:, :1], ids], 1))[:, 2:])
    assert torch.autograd.gradcheck(
        lambda w: ToyDenoiser(w, num_tokens=2, length=4).logits(ids)[:, 1:, :2], (weights,)
    )


def test_eos_can_be_an_ordinary_token() -> None:
    toy = ToyDenoiser.random(seeded(4), num_tokens=3, length=2, eos_id=2)
    assert (toy.eos_id, toy.mask_id, toy.pad_id) == (2, 3, 4)
    assert float(toy.logits(torch.tensor([[0, 3, 3]]))[0, 1].softmax(-1)[2]) > 0.01


@pytest.mark.parametrize(("num_tokens", "length", "size"), [(5, 2, 25), (2, 7, 128), (3, 2, 8)])
def test_sizes_that_cannot_be_enumerated_are_refused(
    num_tokens: int, length: int, size: int
) -> None:
    with pytest.raises(ValueError, match="the toy enumerates"):
        ToyDenoiser(torch.zeros(size), num_tokens=num_tokens, length=length)
