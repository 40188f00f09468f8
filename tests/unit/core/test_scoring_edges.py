"""The public ``token_logps`` and ``view_logps`` at their edges: no rows, and a second backward
pass.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import finished_rollout, seeded, tiny_llada
from unmaskrl.core.estimators import ESTIMATORS, elbo
from unmaskrl.core.scoring import token_logps, view_logps


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_no_rows_have_no_log_probabilities(name: str) -> None:
    denoiser = tiny_llada()
    some = finished_rollout([[1, 2, 3]], [[1, 2, 3]], eos_id=denoiser.eos_id)
    none = some.rows(torch.zeros(0, dtype=torch.int64))
    estimator = ESTIMATORS[name]()
    views = estimator.make_views(none, denoiser.mask_id, seeded(1))
    assert view_logps(denoiser, none, views).shape == views.ids.shape
    got = token_logps(denoiser, none, estimator, views)
    assert got.shape == none.ids.shape and len(got) == 0


def test_a_second_backward_pass_is_refused_and_never_wrong() -> None:
    denoiser = tiny_llada()
    estimator = elbo(num_mc=2)
    rollout = finished_rollout(
        [[1, 2, 3], [3, 2, 1]], [[1, 2, 3], [3, 2, 1]], eos_id=denoiser.eos_id
    )
    views = estimator.make_views(rollout, denoiser.mask_id, seeded(1))
    denoiser.model.requires_grad_(True)
    total = token_logps(denoiser, rollout, estimator, views).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
