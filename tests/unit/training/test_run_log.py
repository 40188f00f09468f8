"""What a run says of its own metrics."""

from __future__ import annotations

from unmaskrl.training.log import alarms


def test_collapse_and_exploding_ratios_are_said() -> None:
    fine = {"accuracy/rollout": 0.5, "ratio/max_dev": 1.0, "sampler/fewest_calls": 0.5}
    assert alarms(fine) == [] and alarms({"accuracy/rollout": 0.5, "ratio/max_dev": None}) == []
    (collapse,) = alarms({**fine, "sampler/fewest_calls": 0.98})
    assert "98% of the rollouts (right: 50%)" in collapse and "sampler.alpha" in collapse
    (ratio,) = alarms({**fine, "ratio/max_dev": 2e7})
    assert "2e+07" in ratio and "sequence_clip" in ratio


def test_absurd_and_missing_numbers_are_said() -> None:
    fine = {
        "accuracy/rollout": 0.5,
        "advantage/largest": 1.5,
        "grad_norm": 2.0,
        "loss": None,
        "updates/skipped": 0.0,
    }
    assert alarms(fine) == []
    (advantage,) = alarms({**fine, "advantage/largest": 2e6})
    assert "2e+06" in advantage and "group_mean_std" in advantage
    (norm,) = alarms({**fine, "grad_norm": 3e7})
    assert "3e+07" in norm and "optimizer.lr" in norm
    (skipped,) = alarms({**fine, "updates/skipped": 2.0})
    assert skipped.startswith("2 updates of this step were skipped")
    (nan,) = alarms({**fine, "kl/ref": float("nan"), "likelihood/variance": float("inf")})
    assert "kl/ref, likelihood/variance" in nan
