"""The script for a real server, on the stub."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import served
from tests.stub_server import THRESHOLD, Stub

SETTINGS = (
    f"task.numbers=3 task.train_size=8 task.eval_size=4 decode.gen_length=10 decode.block_length=4 "
    f"decode.steps=5 decode.select=confidence_threshold decode.gamma={THRESHOLD} "
    "decode.temperature=1.0 decode.exit_at=null estimator.name=trajectory prior.name=none "
    "prior.keep_end=null train.prompts_per_step=2 train.group_size=2 model.dtype=float32"
).split()


def test_the_script_says_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = Stub(tmp_path / "base")
    words = ["countdown-mini", f"model.path={stub.folder}", *SETTINGS, f"rollouts.url={stub.url}"]
    assert served.main(words) == 0
    said = capsys.readouterr().out
    assert "it serves: row_keys, shown_logps, step_maps" in said
    assert "100% of its greedy tokens are the trainer's; 20 rollouts score -" in said
    assert "greedy rows that are the same alone and at once: 16 of 16" in said
    stub.greedy = True
    assert served.main(words) == 1
    assert "cannot be used: rollouts sglang: 4 samples" in capsys.readouterr().out
    stub.stop()
