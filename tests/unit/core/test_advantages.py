"""Group advantages against hand-worked numbers; rows of a group apart, groups of one, groups
without spread.
"""

from __future__ import annotations

import math
import statistics
from math import exp

import pytest
import torch

from tests.conftest import same_maths, seeded
from unmaskrl.core.advantages import ADVANTAGES, group_mean, group_mean_std, groups_with_spread

REWARDS = torch.tensor([1.0, 0.0, 5.0, 3.0, 0.0, 2.0])
GROUPS = torch.tensor([40, 7, 40, 40, 7, 9])  # not adjacent, not sorted, not contiguous; 9 is alone


def test_group_mean_by_hand() -> None:
    assert group_mean(REWARDS, GROUPS).tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0, 0.0]


def test_group_mean_std_by_hand() -> None:
    # Group 40: rewards 1, 5, 3; mean 3, std with n - 1 is 2. Group 7 has no spread, group 9 one
    # row.
    expected = [-2 / 2.0001, 0.0, 2 / 2.0001, 0.0, 0.0, 0.0]
    assert group_mean_std(REWARDS, GROUPS).tolist() == pytest.approx(expected, abs=1e-6)


def test_groups_with_spread_by_hand() -> None:
    assert groups_with_spread(REWARDS, GROUPS).tolist() == [True, False, True, True, False, False]
    assert groups_with_spread(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_against_the_statistics_module_on_random_groups(name: str) -> None:
    generator = seeded(3)
    rewards = torch.rand(40, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 7, (40,), generator=generator) * 1000 - 3000
    got = ADVANTAGES[name]()(rewards, groups)
    for i, (reward, group) in enumerate(zip(rewards.tolist(), groups.tolist(), strict=True)):
        members = [r for r, g in zip(rewards.tolist(), groups.tolist(), strict=True) if g == group]
        expected = {
            "group_mean": lambda r, m: r - statistics.mean(m),
            "group_mean_std": lambda r, m: (r - statistics.mean(m)) / (statistics.stdev(m) + 1e-4),
            "leave_one_out": lambda r, m: r - (sum(m) - r) / (len(m) - 1),
            "softmax_weights": lambda r, m: (
                exp(r) / sum(map(exp, m)) - exp(-r) / sum(exp(-x) for x in m)
            ),
        }[name]
        assert float(got[i]) == pytest.approx(
            expected(reward, members) if len(members) > 1 else 0.0, abs=1e-9
        )


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("value", [1.1, 0.1, 0.3, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [1, 3, 6, 7, 12])
def test_a_group_without_spread_gets_exactly_zero(name: str, value: float, size: int) -> None:
    # A rounding error in the mean would be divided by 1e-4: AdamW would then step on pure noise.
    rewards = torch.full((size,), value, dtype=torch.float32)
    assert (
        ADVANTAGES[name]()(rewards, torch.zeros(size, dtype=torch.int64)).tolist() == [0.0] * size
    )


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_order_of_rows_and_names_of_groups_do_not_matter(name: str) -> None:
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    shuffled = ADVANTAGES[name]()(REWARDS[order], GROUPS[order] * -5)
    assert same_maths(shuffled, ADVANTAGES[name]()(REWARDS, GROUPS)[order])


def test_softmax_weights_of_far_rewards_by_hand() -> None:
    far = torch.tensor([0.0, 200.0, 0.0, 200.0, 200.0, 200.0])
    groups = torch.tensor([0, 0, 1, 1, 1, 1])
    # softmax(r) - softmax(-r): all of the weight on one end each
    expected = [-1.0, 1.0, -1.0, 1 / 3, 1 / 3, 1 / 3]
    assert ADVANTAGES["softmax_weights"]()(far, groups).tolist() == pytest.approx(
        expected, rel=1e-6
    )


def test_softmax_weights_are_torchs_softmax_on_ordinary_rewards() -> None:
    rewards = torch.randn(12, generator=seeded(4)) * 3
    got = ADVANTAGES["softmax_weights"]()(rewards, torch.zeros(12, dtype=torch.int64))
    wide = rewards.double()
    assert torch.allclose(got.double(), wide.softmax(0) - (-wide).softmax(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1e10, 1e20, 3e38])
def test_statistics_do_not_overflow_before_the_advantage_does(size: float) -> None:
    """(r - mean)^2 is beyond float32 from 1e19 on: a standard deviation of inf made every advantage
    0.
    """
    rewards = torch.tensor([size, -size, 0.0])
    group = torch.zeros(3, dtype=torch.int64)
    assert group_mean_std(rewards, group).tolist() == pytest.approx([1.0, -1.0, 0.0], rel=1e-6)
    assert group_mean(rewards, group).tolist() == pytest.approx([size, -size, 0.0], rel=1e-6)
    wide = torch.tensor([1e308, -1e308, 0.0], dtype=torch.float64)
    assert group_mean_std(wide, group).tolist() == pytest.approx([1.0, -1.0, 0.0], rel=1e-9)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_what_cannot_be_an_advantage_is_not_made_a_zero(name: str) -> None:
    pair = torch.zeros(2, dtype=torch.int64)
    assert not ADVANTAGES[name]()(torch.tensor([math.inf, 0.0]), pair).isfinite().any()
    assert not ADVANTAGES[name]()(torch.tensor([math.nan, 0.0]), pair).isfinite().any()
    assert ADVANTAGES["leave_one_out"]()(torch.tensor([3e38, -3e38]), pair).isinf().all()
