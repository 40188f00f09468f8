"""Supervised runs: the shipped base can be made again, and a run resumes, stops, averages, adapts
and splits as one of RL does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmaskrl as u
from tests.conftest import rounded
from tests.runs import ended, rows, two_ranks
from unmaskrl.cli.main import main
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.hub import ASSETS, asset
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.schema import SFTRecipe
from unmaskrl.reporting.progress import Progress
from unmaskrl.training.sft.loop import run_sft
from unmaskrl.utils.stopping import Stopped

SMALL = (
    "train.steps=12 run.save_every=5 run.log_every=1 run.threads=1 run.log_with=[] "
    "data.0.num_examples=200 data.1.num_examples=200 data.0.batch_size=8 data.1.batch_size=8 "
    "eval_decode={}"
).split()


def small(out: Path, *settings: str) -> SFTRecipe:
    return load_recipe("mini-base", [*SMALL, *settings, f"run.out={out}"], SFTRecipe)


def assert_same(one: Path, other: Path) -> None:
    """The same log, but for times, and bit-equal weights."""
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")
    for folder in sorted(path.name for path in one.glob("model*")):
        ours, theirs = (
            load_file(next((run / folder).glob("*.safetensors"))) for run in (one, other)
        )
        assert ours.keys() == theirs.keys()
        assert all(ours[k].equal(theirs[k]) for k in ours), folder


def test_the_first_ten_steps_reproduce_the_logged_loss(tmp_path: Path) -> None:
    """Same data, masks and weights; sums may differ in the last bits between machines, hence
    1e-3.
    """
    run_sft(load_recipe("mini-base", [f"run.out={tmp_path / 'run'}"], SFTRecipe), stop_at=10)
    ours = rows(tmp_path / "run" / "metrics.jsonl")
    logged = rows(ASSETS / "mini" / "log.jsonl")[:1]
    assert [row["step"] for row in ours] == [row["step"] for row in logged] == [10]
    for a, b in zip(ours, logged, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_interrupted_sft_resumes_exactly(tmp_path: Path) -> None:
    runs = {name: small(tmp_path / name, "train.ema=0.5") for name in "ab"}
    run_sft(runs["a"])
    run_sft(runs["b"], stop_at=8)
    run_sft(runs["b"], resume=True)
    assert_same(tmp_path / "a", tmp_path / "b")
    raw, average = (
        load_file(tmp_path / "a" / name / "model.safetensors") for name in ("model-raw", "model")
    )
    assert not all(raw[name].equal(average[name]) for name in raw)


class StoppedAt(Progress):
    """Sends a signal once a step was logged."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.at = step

    def step(self, row: dict) -> None:
        if row["step"] == self.at:
            # not SIGINT: a test run in the background may have been told to ignore that
            os.kill(os.getpid(), signal.SIGTERM)


def test_adapters_train_stop_resume_and_load(tmp_path: Path) -> None:
    settings = ("model.path=mini", "model.lora.rank=4", "train.steps=4", "run.save=both")
    run_sft(small(tmp_path / "a", *settings))
    with pytest.raises(Stopped, match="stopped at step 2 of 4"):
        run_sft(small(tmp_path / "b", *settings), progress=StoppedAt(2))
    assert not (tmp_path / "b" / "model").exists()
    run_sft(small(tmp_path / "b", *settings), resume=True)
    assert_same(tmp_path / "a", tmp_path / "b")
    folder = tmp_path / "a" / "model"
    base = load_denoiser(asset("mini")).model.state_dict()
    moved = {
        name
        for name, value in load_file(folder / "model.safetensors").items()
        if not value.equal(base[name])
    }
    assert moved and all("blocks" in name for name in moved), "adapters are in blocks alone"
    merged = u.load(folder).denoiser
    adapted = u.load(folder / "adapter").denoiser
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for a, b in zip(merged.logits(ids).flatten(), adapted.logits(ids).flatten(), strict=True):
            assert float(a) == rounded(float(b), size=100.0, dtype=torch.float32)


def test_two_sharded_ranks_equal_one(tmp_path: Path) -> None:
    settings = ("model.dtype=float64", "train.steps=3", "train.ema=0.5")
    run_sft(small(tmp_path / "one", *settings))
    words = ["sft", "mini-base", *SMALL, *settings, "train.shard=fsdp", f"run.out={tmp_path}/two"]
    done = ended(two_ranks(words))
    assert [code for code, *_ in done] == [0, 0], done
    assert "model: " in done[0][1] and not done[1][1], "one rank speaks"
    for name in ("model", "model-raw"):
        one, two = (load_file(tmp_path / n / name / "model.safetensors") for n in ("one", "two"))
        assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-9
    for a, b in zip(*(rows(tmp_path / n / "metrics.jsonl") for n in ("one", "two")), strict=True):
        assert a == {key: pytest.approx(b[key], rel=1e-9) for key in a}


def test_what_does_not_fit_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, said in (
        ("model.lora.rank=4", "model.lora changes a checkpoint: set model.path"),
        ("model.n_heads=0", "model.n_heads: input should be greater than 0"),
        ("model.n_heads=3", "model.d_model 128 / model.n_heads 3 must be an even whole number"),
        ("model.quantize=nf4", "4-bit weights cannot be trained; set model.lora.rank"),
        ("run.log_with=[nothing]", "run.log_with.0"),
        (
            "eval_decode={sudoku: {gen_length: 20, block_length: 7, steps: 4}}",
            "eval_decode.sudoku: block_length 7 does not divide gen_length 20",
        ),
        ("data.0.gen_length=4", "tokens, gen_length is 4: raise it"),
        ("data.0.gen_length=5000", "lower gen_length, or give shorter ones"),
    ):
        words = ["sft", "mini-base", *SMALL, setting, f"run.out={tmp_path / 'run'}"]
        assert main(words) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_saved_model_tells_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = "eval_decode={sudoku: {gen_length: 20, block_length: 20, steps: 4}}"
    words = [*SMALL, "train.steps=1", "data.0.task.eval_size=6", decode]
    assert main(["sft", "mini-base", *words, f"run.out={tmp_path / 'run'}"]) == 0
    assert "sudoku, greedy" in capsys.readouterr().out
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| base | none: trained from scratch |" in card and "| steps | 1, seed 0 |" in card
    assert "| sudoku, greedy | 0.0% | 6 | 4.0 |" in card
    assert "supervised masked diffusion" in card and f"unmaskrl {u.__version__}" in card
    assert repr(u.load(tmp_path / "run")).startswith("Model(")


def test_a_checkpoint_that_could_not_be_written_is_said_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError("checkpoint x could not be written (No space left on device)")

    monkeypatch.setattr("unmaskrl.training.saving.save_run", full)
    words = ["sft", "mini-base", *SMALL, "train.steps=1", f"run.out={tmp_path / 'run'}"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "error: the run is complete, but checkpoint x could not be written" in said.err
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_recipes_and_folders_of_the_other_kind_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["sft", "mini-base", *SMALL, "train.steps=1", f"run.out={out}"]) == 0
    supervised = "this is a supervised recipe (it has data:); run it by unmaskrl sft"
    rl = "this is a recipe of RL (it has task:); run it by unmaskrl train"
    for words, said in (
        (["train", str(out), "--resume"], supervised),
        (["check", "mini-base"], supervised),
        (["sft", "sudoku-mini"], rl),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert capsys.readouterr().err == f"unmaskrl: error: {said}\n"
    assert main(["report", str(out)]) == 0
    assert "A supervised run." in (out / "report.html").read_text()
