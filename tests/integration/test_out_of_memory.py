"""A device whose memory is exhausted: fewer canvases at once, the same run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import rounded
from unmaskrl.cli.main import main
from unmaskrl.core import scoring
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.memory import GIB, HEADROOM, Setup, memory_plan, model_shape

SETTINGS = (
    "model.dtype=float64 train.steps=1 train.prompts_per_step=1 train.group_size=4 "
    "train.num_iterations=2 run.threads=1 run.log_with=[] run.probe=false task.train_size=8 "
    "loss.kl_coef=0.01 eval.size=2 eval.size_during=2"
).split()


def run(out: Path, *settings: str, steps: int = 1) -> dict[str, Any]:
    """The last step's metrics."""
    assert main(["train", "sudoku-mini", *SETTINGS, *settings, f"run.out={out}"]) == 0
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == steps
    return json.loads(rows[-1])


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Canvases of each pass that was made; more than the first number are too many."""
    seen: list[int] = [5]
    plain = scoring._Work.score

    def score(self: Any, denoiser: Any, chunk: slice) -> torch.Tensor:
        start, stop, _ = chunk.indices(self.num_canvases)
        if stop - start > seen[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append(stop - start)
        return plain(self, denoiser, chunk)

    monkeypatch.setattr(scoring._Work, "score", score)
    return seen


def test_fewer_canvases_are_alive_and_the_run_is_the_same(
    tmp_path: Path, small_memory: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = run(tmp_path / "small")
    said = capsys.readouterr().out
    assert "step 1: out of memory with " in said
    assert said.count("out of memory") == said.count("from here on") >= 2
    assert 2 <= max(small_memory[1:]) <= 5
    small_memory[0] = 10**6
    straight = run(tmp_path / "straight")
    for key in ("loss", "grad_norm", "kl/ref", "ratio/mean"):
        assert ours[key] == rounded(straight[key], size=10.0, dtype=torch.float64), key


def test_the_number_that_was_chosen_stays_with_the_run(
    tmp_path: Path,
    small_memory: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A machine for three canvases; the run goes on with three on one with room for all."""
    small_memory[0] = 10**6
    recipe = load_recipe("sudoku-mini", SETTINGS)
    shape = model_shape(recipe.model)
    assert shape is not None
    setup = Setup.of(recipe, shape, prompt_tokens=19, cuda=False)
    gib = memory_plan(shape, replace(setup, max_canvases=3)).total / HEADROOM / GIB
    place = "unmaskrl.training.memory_notes.this_machine"
    monkeypatch.setattr(place, lambda processes: ("small", gib * (1 + 1e-9)))
    run(tmp_path / "run")
    assert "small: fits" in (said := capsys.readouterr().out)
    assert "train.max_canvases=auto is 3 (an update has" in said.replace("\n", " ")
    monkeypatch.setattr(place, lambda processes: ("large", 1000.0))
    before = len(small_memory)
    run(tmp_path / "run", "train.steps=2", "--resume", steps=2)
    assert max(small_memory[1:before]) == max(small_memory[before:]) == 3


def test_one_canvas_that_is_too_much_is_one_line(
    tmp_path: Path, small_memory: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    small_memory[0] = 0
    assert main(["train", "sudoku-mini", *SETTINGS, f"run.out={tmp_path / 'run'}"]) == 2
    assert "out of memory with 1 canvases alive (CUDA out of memory." in capsys.readouterr().err


def test_memory_that_is_exhausted_elsewhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In decoding, of training and of `eval` alike."""

    def decode(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr("unmaskrl.core.rollouts.decode", decode)
    for words in (
        ["train", "sudoku-mini", *SETTINGS, f"run.out={tmp_path / 'run'}"],
        ["eval", "mini", "--task", "sudoku", "--size", "2"],
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("unmaskrl: error: out of memory (CUDA out of memory. Tried to")
        assert "--batch-size" in line and "More" not in line
