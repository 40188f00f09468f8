"""Every published method's preset, trained for two steps; some of them, for one, with
spatio-temporal pruning switched on.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

from unmaskrl.core.types import Views
from unmaskrl.recipes.cost import step_cost
from unmaskrl.recipes.files import is_method, recipe_names
from unmaskrl.recipes.load import load_recipe
from unmaskrl.reporting.metrics import find
from unmaskrl.tasks import completion_text
from unmaskrl.training.rollouts.open_step import Batch
from unmaskrl.training.state import Run

train_module = importlib.import_module("unmaskrl.training.loop")

METHODS = [name for name in recipe_names() if is_method(name)]
PRUNED = ["prior.name=anchors", "decode.exit_at=0.8"]
RUNS = [(name, []) for name in METHODS]
RUNS += [
    (name, PRUNED) for name in ("diffu_grpo", "spg_mix", "espo", "tracerl", "wd1", "coupled_grpo")
]
RUNS += [
    ("elbo_grpo", [*PRUNED, "estimator.hide_anchors=true"]),
    ("gdpo", ["prior.name=anchors", "prior.keep=0.5"]),
]
TINY = (
    "train.prompts_per_step=2 train.group_size=3 run.threads=1 run.log_with=[] optimizer.warmup=1 "
    "run.probe=false task.train_size=200 "
    "train.reward_functions=[tests.integration.test_presets:spread] eval.size=2 eval.size_during=2 "
    "decode.temperature=1.0"
).split()


def spread(prompts: list, completions: list, **columns: list[str]) -> list[float]:
    """A reward that nearly always differs within a group."""
    assert len(prompts) == len(completions) == len(columns["puzzle"])
    texts = [completion_text(completion) for completion in completions]
    return [sum(i * ord(letter) for i, letter in enumerate(text)) % 97 / 97 for text in texts]


@pytest.mark.parametrize(
    ("name", "overrides"), RUNS, ids=lambda v: v if isinstance(v, str) else "stp" if v else "plain"
)
def test_it_trains(
    name: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    original = train_module.check_first_ratio

    def check_first_ratio(run: Run, batch: Batch, views: Views) -> dict[str, float]:
        compared.append(int((views.weight != 0).sum()))
        return original(run, batch, views)

    monkeypatch.setattr(train_module, "check_first_ratio", check_first_ratio)
    steps = 1 if overrides else 2
    size = [
        f"train.num_iterations={min(2, load_recipe(name).train.num_iterations)}",
        f"train.steps={steps}",
    ]
    recipe = load_recipe(name, [*TINY, *size, *overrides, f"run.out={tmp_path / 'run'}"])
    train_module.train(recipe)
    assert len(compared) == 1 and compared[0] > 20  # every ratio was 1 before the first update
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == steps
    assert rows[0]["health/first_log_ratio"] < 1e-3 and all(
        "health/first_log_ratio" not in row for row in rows[1:]
    )
    cost = step_cost(recipe)
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, (int, float)))
        assert all(find(key) for key in row), "a figure that is not in the table of metrics"
        assert row["health/behavior_gap"] < 1e-4 and row["grad_norm"] > 0
        assert 0 < row["calls/score"] <= cost.old + cost.ref + cost.new
        assert (row["rollout/anchors"] > 0) == (recipe.prior.name == "anchors")
        assert 0 < row["calls/rollout"] <= cost.rollout or overrides
