"""The GPU benchmark as a script: every section runs, and figures nobody measured are not shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_the_script_runs_at_its_smallest_size(tmp_path: Path) -> None:
    gpu.main(["--cpu", "--out", str(tmp_path / "card")])
    result = json.loads((tmp_path / "card.json").read_text())
    assert {row["section"] for row in result["rows"]} == {
        "ceilings",
        "body, plain",
        "published loop",
        "rollout, plain",
        "rollout, LoRA",
        "scoring, all weights",
        "scoring, LoRA",
        "forward + backward, all weights",
        "forward + backward, LoRA",
        "per call",
        "whole run",
    }
    assert result["machine"]["layers"] == 0, "no real model"
    assert all(row.get("ms", 1) > 0 and "peak_gib" not in row for row in result["rows"])
    compared = [r["what"] for r in result["rows"] if "ratio" in r and "plain" in r["section"]]
    assert compared == ["LLaDA-8B, B 2, greedy", "LLaDA-8B, B 2, T .9"]
    waits = [row["synchronisations"] for row in result["rows"] if row["section"] == "per call"]
    assert waits == [None, None], "a CPU waits for nothing"
    table = (tmp_path / "card.md").read_text()
    assert table.count("\n") == len(result["rows"]) + 4 and "| - |" in table


@pytest.mark.parametrize("words", [[], ["--small"]])
def test_without_a_gpu_it_says_so(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert "there is no CUDA device; --cpu tries the script" in capsys.readouterr().err
