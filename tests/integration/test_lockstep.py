"""Ranks whose rows finish at different calls: no deadlock on sharded weights, and no waiting where
a whole copy fits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What each rank says of each mode."""
    out = tmp_path_factory.mktemp("reports")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launcher, "-m", "tests.integration.shard_worker", str(out)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {mode: [said[mode] for said in ranks] for mode in ranks[0]}


@pytest.mark.parametrize("mode", ["lockstep", "gathered"])
def test_very_different_lengths(reports: dict[str, list[dict]], mode: str) -> None:
    """48 calls against 4: equal to the unsharded rollouts, within the time limit; only in lock-step
    does rank 1 go along with the others' calls.
    """
    long, short = reports[mode]
    assert long["equal"] and short["equal"]
    assert long["calls"] > 3 * short["calls"]
    assert long["passes"] == long["calls"]
    assert short["passes"] == (long if mode == "lockstep" else short)["calls"]
    assert long["gradient"] == pytest.approx(short["gradient"]) and long["gradient"] > 0


def test_experts_and_caches_on_sharded_weights(reports: dict[str, list[dict]]) -> None:
    """Ranks whose tokens go to other experts add up the same gradients as one process."""
    assert reports["blocks"] == [{"equal": True, "gradients": True}] * 2
