"""Which estimators importance weights are for: E over the rollouts of p(surrogate) / p(drawn) is 1,
by enumeration.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.conftest import finished_rollout, seeded
from unmaskrl.core.estimators import ESTIMATORS, Update, trajectory
from unmaskrl.core.estimators.base import DRAW, READING
from unmaskrl.core.importance import truncated_weights
from unmaskrl.core.scoring import token_logps
from unmaskrl.core.toy import ToyDenoiser

READ = (1, 2, 3, 4)  # decoded_step of the four tokens
PAIRS = (1, 1, 2, 2)
MIXED = (3, 1, 2, 1)
SETTINGS = [
    ("coupled", {}),
    ("elbo", {}),
    ("elbo", {"num_mc": 1}),
    ("elbo", {"visible": True}),
    ("espo", {}),
    ("gauss", {}),
    ("gauss", {"weight": "count"}),
    ("left_to_right", {}),
    ("mean_field", {"p_mask_prompt": 0.0}),
    ("mean_field", {"p_mask_prompt": 0.5}),
    ("sandwich", {"mask": "random"}),
    ("trajectory", {}),
    ("trajectory", {"num_segments": 2}),
    ("trajectory", {"p_mask_prompt": 0.5}),
    ("two_mean_field", {}),
    ("two_mean_field", {"num_times": 2}),
    ("unigrpo", {}),
]


def expected_weights(
    name: str, options: dict, steps: tuple[int, ...], eos_id: int = 9, row_id: int = 0
) -> Tensor:
    """(4,) E[w_i] under the decoder that reveals tokens in these calls: all 81 completions, one
    draw of the views for all.
    """
    toy = ToyDenoiser.random(seeded(5), num_tokens=3, length=4, noise=0.7)
    count = len(toy.completions)
    whole = finished_rollout(
        toy.completions.tolist(), [steps] * count, eos_id=9, row_ids=[row_id] * count
    )
    replay = trajectory().make_views(whole, toy.mask_id, seeded())
    drawn = token_logps(toy, whole, trajectory(), replay)
    rollout = finished_rollout(
        toy.completions.tolist(), [steps] * count, eos_id=eos_id, row_ids=[row_id] * count
    )
    made = ESTIMATORS[name](**options)
    views = made.make_views(rollout, toy.mask_id, seeded(3), Update(0, 4, 11))
    scores = token_logps(toy, rollout, made, views)
    weights = truncated_weights(scores, drawn, rollout.action_mask, cap=1e9)
    probs = drawn.sum(-1).exp()
    used = rollout.action_mask
    assert float(probs.sum()) == pytest.approx(1, rel=1e-9)
    return ((probs[:, None] * weights).sum(0) / (probs[:, None] * used).sum(0))[-4:]


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [READ, PAIRS, MIXED], ids=str)
def test_weights_average_to_1_exactly_where_the_estimator_says_so(
    name: str, options: dict, steps: tuple[int, ...]
) -> None:
    of = ESTIMATORS[name](**options).probability_of
    # the toy ignores its prompt; a model whose rollouts saw all of it does not
    if options.get("p_mask_prompt"):
        assert of is None
        return
    off = max(
        float((expected_weights(name, options, steps, row_id=row) - 1).abs().max())
        for row in range(4)
    )
    if of == DRAW or (of == READING and steps == READ):
        assert off < 1e-6
    elif of is None or steps == MIXED:
        assert off > 0.02


def test_with_eos_the_average_is_only_near_1() -> None:
    """Whether a token counts depends on what is drawn later: is/mean that is not 1 is no sign of a
    fault.
    """
    got = expected_weights("mean_field", {"p_mask_prompt": 0.0}, (4, 3, 2, 1), eos_id=2)
    assert 1e-3 < float((got - 1).abs().max()) < 0.5
