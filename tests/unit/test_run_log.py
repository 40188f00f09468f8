"""What a run says of its own metrics."""

from __future__ import annotations

from unmaskrl.run_log import alarms


def test_collapse_and_exploding_ratios_are_said() -> None:
    fine = {"accuracy/rollout": 0.5, "ratio/max_dev": 1.0, "sampler/fewest_calls": 0.5}
    assert alarms(fine) == [] and alarms({"accuracy/rollout": 0.5, "ratio/max_dev": None}) == []
    (collapse,) = alarms({**fine, "sampler/fewest_calls": 0.98})
    assert "98% of the rollouts (right: 50%)" in collapse and "threshold.alpha" in collapse
    (ratio,) = alarms({**fine, "ratio/max_dev": 2e7})
    assert "2e+07" in ratio and "sequence_clip" in ratio
