"""How figures of ranks and of inner updates become one."""

from __future__ import annotations

import math

import pytest

from unmaskrl.reporting.merging import over_ranks, over_updates
from unmaskrl.reporting.metrics import find, labelled


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("ratio/mean", 4.0),  # each rank's terms over the global count
        ("ratio/max_dev", 3.0),
        ("accuracy/rollout", 2.0),
        ("calls/rollout", 1.0),  # reduced where it was counted
        ("groups/used_rows", 4.0),
        ("reward/my_part", 2.0),
        ("is/share_q1", 4.0),
        ("loss", 4.0),
        ("mine/entropy", 4.0),  # of a loss from outside
    ],
)
def test_figures_of_ranks(key: str, wanted: float) -> None:
    assert over_ranks(key, [1.0, 3.0]) == wanted


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("ratio/mean", 2.0),
        ("ratio/max_dev", 3.0),
        ("seconds/update", 4.0),
        ("updates/skipped", 4.0),
        ("mine/entropy", 2.0),
    ],
)
def test_figures_of_updates(key: str, wanted: float) -> None:
    assert over_updates(key, [1.0, 3.0]) == wanted


def test_what_is_not_a_number_is_not_lost() -> None:
    """A bad number of one rank has to stop, or skip, the update on all."""
    for key in ("loss", "ratio/max_dev", "accuracy/rollout"):
        assert math.isnan(over_ranks(key, [1.0, math.nan])), key
        assert math.isnan(over_ranks(key, [math.nan, 1.0])), key


def test_a_star_stands_for_the_rest() -> None:
    unscored = find("reward/unscored")
    part = find("reward/format")
    assert unscored is not None and unscored.alarm == 0
    assert part is not None and part.key == "reward/*"
    assert find("reward_log/x") is not part
    assert find("nothing/like_it") is None
    assert labelled("reward") == {"reward/mean": "sum"}
