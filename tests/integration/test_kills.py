"""Runs killed at random times and moments end bit-equal to one left alone (tests/kill_many.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_killed_runs_are_bit_equal() -> None:
    script = Path(__file__).parents[1] / "kill_many.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "2", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) kills in \d+ runs, 0 differences", done.stdout)
    assert found and int(found[1]) >= 2
