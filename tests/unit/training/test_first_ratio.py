"""The first update's ratios are 1, measured against the clip range."""

from __future__ import annotations

from math import inf, log, nan

import pytest

from unmaskrl.training.first_ratio import SHARE, check_range


@pytest.mark.parametrize("dtype", sorted(SHARE))
@pytest.mark.parametrize("clip_range", [log(1.2), log(1.5), 1e-3])
def test_what_is_allowed_is_a_share_of_the_clip_range(dtype: str, clip_range: float) -> None:
    check_range(0.0, clip_range, dtype)
    check_range(0.99 * SHARE[dtype] * clip_range, clip_range, dtype)
    for worst in (1.01 * SHARE[dtype] * clip_range, clip_range, inf, nan):
        with pytest.raises(
            ValueError,
            match=rf"ratio is not 1 before the first update.*allowed in {dtype}.*model.dtype",
        ):
            check_range(worst, clip_range, dtype)


def test_half_a_nat_is_refused_in_bfloat16_whatever_the_loss() -> None:
    """It was allowed: 0.5 nats are a ratio of 1.65, beyond every clip range in use."""
    for clip_range in (log(1.2), -log(0.5), inf):
        with pytest.raises(ValueError, match=r"differ by 5\.00e-01 nats"):
            check_range(0.5, clip_range, "bfloat16")
    check_range(0.05, inf, "bfloat16")
