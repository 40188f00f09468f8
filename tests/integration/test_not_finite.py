"""A number that is not finite ends a command in one line, with nothing saved that is not; ranks end
together.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import LIMIT, ended, start, two_ranks
from unmaskrl.cli.main import main
from unmaskrl.models.hub import asset

SMALL = (
    "train.steps=3 train.prompts_per_step=2 train.group_size=4 train.num_iterations=2 "
    "run.threads=1 run.log_with=[] "
    "optimizer.warmup=0 run.save_every=1 run.keep_checkpoints=9 run.probe=false "
    "task.train_size=20 eval.size=4 eval.size_during=4"
).split()
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
REWARDS = """
import os
steps = 0

def huge(prompts, completions, **columns):
    "Finite in float32; the loss is not."
    return [3e38 * (i % 2) for i in range(len(completions))]

def second(prompts, completions, **columns):
    "Huge in the second step only (8 completions each; a reward is tried on fewer before the run)."
    global steps
    steps += len(completions) == 8
    return [3e38 * (i % 2) if steps == 2 else float(i % 2) for i in range(len(completions))]

def breaks_rank_1(prompts, completions, **columns):
    "From the second step on, the weights of rank 1 alone are NaN: a broken card."
    global steps
    steps += len(completions) == 4
    if os.environ.get("RANK") == "1" and steps == 1:
        from unmaskrl.core import rollouts
        whole = rollouts.decode
        def decode(denoiser, *args, **options):
            next(denoiser.model.parameters()).data.fill_(float("nan"))
            return whole(denoiser, *args, **options)
        rollouts.decode = decode
    return [float(i % 2) for i in range(len(completions))]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the odd rewards."""
    (tmp_path / "odd_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def words(*more: str) -> list[str]:
    return ["train", "sudoku-mini", *SMALL, "run.out=out", *more]


def one_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that ends with code 2."""
    code = main(list(argv))
    said = capsys.readouterr()
    assert code == 2, said.out + said.err
    (line,) = said.err.splitlines()
    assert line.startswith("unmaskrl: error: ")
    return line


def assert_finite(folder: Path) -> int:
    """Every saved tensor; returns the number of files."""
    files = list(folder.rglob("*.safetensors"))
    for file in files:
        for name, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{file}: {name}"
    return len(files)


def test_a_learning_rate_that_is_far_too_high(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: nothing else that it loads adds a line to standard error."""
    process = start(words("optimizer.lr=1e10"))
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "step 1: inner update 2: loss is nan, grad_norm is nan" in line
    assert "largest |advantage| 1.5" in line and "checkpoints/update-000001" in line
    assert assert_finite(here / "out") >= 3
    assert "optimizer.lr: input should be less than" in one_line(
        capsys, *words("optimizer.lr=1e39", "run.out=new")
    )


def test_rewards_whose_loss_overflows_stop_two_ranks_together(here: Path) -> None:
    chosen = ("train.reward_functions=[odd_rewards:huge]", "advantage.name=group_mean")
    for code, _, err in ended(two_ranks(words(*chosen))):
        assert code == 2
        lines = [line for line in err.splitlines() if line.startswith("unmaskrl: error: ")]
        assert lines and all("step 1: inner update 1: loss is" in line for line in lines), err
        assert all("last good checkpoint: none yet" in line for line in lines)
    assert assert_finite(here / "out") == 0 and not (here / "out" / "metrics.jsonl").exists()


def test_a_rank_whose_decoding_stops_ends_the_other(here: Path) -> None:
    """By torch's launcher: it ends the rank that would wait for ever."""
    chosen = "train.reward_functions=[odd_rewards:breaks_rank_1]"
    done = subprocess.run(
        [sys.executable, *LAUNCHER, "-m", "unmaskrl.cli", *words(chosen)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode != 0
    assert (
        "step 2: decoding stopped after call 1: logits are not finite in 4 of 4 rows: weight"
        in done.stderr
    ), done.stderr
    assert assert_finite(here / "out") >= 3


def test_a_skipped_update_changes_nothing_and_is_counted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = (
        "train.reward_functions=[odd_rewards:second]",
        "advantage.name=group_mean",
        "train.skip_bad_updates=2",
    )
    code = main(words(*chosen, "decode.select=eb", "sampler.mode=joint"))
    shown = capsys.readouterr()
    assert code == 0, shown.err
    said = " ".join(shown.out.split())
    for count in (1, 2):
        assert f"step 2, inner update {count}: loss is" in said
        assert f"skipped ({count} of train.skip_bad_updates=2 in a row)" in said
    text = (here / "out" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [row["updates/skipped"] for row in rows] == [0.0, 2.0, 0.0]
    assert (
        rows[1]["loss"] is None and rows[1]["grad_norm"] is None and math.isfinite(rows[2]["loss"])
    )
    before, after, later = (here / "out" / "checkpoints" / f"update-{n:06d}" for n in (2, 4, 6))
    for group in ("model", "ema", "optimizer", "threshold", "threshold_optimizer"):
        old, new, newest = (
            load_file(folder / f"{group}.safetensors") for folder in (before, after, later)
        )
        assert old.keys() == new.keys() and all(
            torch.equal(old[name], new[name]) for name in old
        ), group
        assert any(not torch.equal(old[name], newest[name]) for name in old), (
            "the step after it is made"
        )
    assert json.loads((after / "state.json").read_text())["skipped"] == 2


def test_one_more_bad_update_than_may_be_skipped_ends_the_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = (
        "train.reward_functions=[odd_rewards:second]",
        "advantage.name=group_mean",
        "train.skip_bad_updates=1",
    )
    line = one_line(capsys, *words(*chosen, "--quiet"))
    assert "step 2: inner update 2: loss is" in line and "after 1 skipped in a row" in line


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped base with one NaN, in the final norm."""
    folder = tmp_path_factory.mktemp("broken") / "mini"
    shutil.copytree(asset("mini"), folder)
    weights = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    weights["model.transformer.ln_f.weight"][0] = math.nan
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "argv",
    [
        tuple(words("run.probe=true")),
        tuple(words()),
        ("eval", "MODEL", "--task", "sudoku", "--size", "4"),
        (
            "eval",
            "MODEL",
            "--task",
            "sudoku",
            "--size",
            "4",
            "--temperature",
            "1",
            "decode.select=eb",
            "decode.gamma=0.1",
        ),
        ("sample", "MODEL", "--task", "sudoku", "decode.exit_at=0.5"),
        ("prior", "MODEL", "--task", "sudoku", "--size", "4", "--out", "prior.jsonl"),
    ],
    ids=["train", "train without probe", "eval", "eval drawn", "sample", "prior"],
)
def test_a_broken_weight_ends_every_command_that_decodes(
    here: Path, broken: Path, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(broken) if word == "MODEL" else word for word in argv]
    line = one_line(capsys, *given, *([f"model.path={broken}"] if given[0] == "train" else []))
    assert (
        "logits are not finite" in line
        and "weight 'model.transformer.ln_f.weight' is not finite" in line
    )
    assert not (here / "prior.jsonl").exists()


def test_supervised_training_stops_as_well(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = (
        "train.steps=4",
        "optimizer.lr=1e20",
        "optimizer.warmup=0",
        "run.save_every=1",
        "run.threads=1",
        "run.out=sft",
    )
    short += tuple(
        f"data.{part}.{key}" for part in (0, 1) for key in ("num_examples=200", "batch_size=8")
    )
    line = one_line(capsys, "sft", "mini-base", *short)
    assert "step 2: " in line and "grad_norm is nan" in line and "update-000001" in line
    # weights, average (none), moments
    assert assert_finite(here / "sft") == 3
