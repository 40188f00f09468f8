"""A run that is killed with SIGKILL and resumed ends bit-equal to one that was left alone. Real
processes, real kills.
"""

from __future__ import annotations

import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import assert_same_run, num_lines, rows, start, wait_until
from unmaskrl.cli.main import main

SETTINGS = (
    "train.steps=6 train.prompts_per_step=2 train.group_size=4 train.num_iterations=2 "
    "run.save_every=3 run.threads=1 run.log_with=[] run.seed=3 run.probe=false "
    "run.keep_checkpoints=9 task.train_size=20 "
    "eval.size=8 eval.size_during=4 eval.every=2 decode.steps=10 decode.exit_at=0.85"
).split()


def words(out: Path, *extra: str) -> list[str]:
    return ["train", "sudoku-mini", *SETTINGS, f"run.out={out}", *extra]


def finish(out: Path, *extra: str) -> None:
    """To the end, in this process."""
    assert main(words(out, *extra)) == 0


def kill_when(out: Path, lines: int, delay: float, *extra: str) -> None:
    """Start a run and SIGKILL it ``delay`` seconds after metrics.jsonl has ``lines`` lines."""
    process = start(words(out, *extra))
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= lines, process)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(out)
    return out


def test_the_run_moved_the_weights(straight: Path) -> None:
    """Otherwise bit-equality would prove nothing."""
    raw = load_file(straight / "model-raw" / "model.safetensors")
    mean = load_file(straight / "model" / "model.safetensors")
    assert any(not raw[k].equal(mean[k]) for k in raw)
    stored = {
        name: load_file(straight / "checkpoints" / "update-000012" / f"{name}.safetensors")
        for name in ("model", "ema")
    }
    assert all(raw[k].equal(value) for k, value in stored["model"].items())
    assert all(mean[k].equal(value) for k, value in stored["ema"].items()), (
        "model/ does not hold the average"
    )
    assert len(rows(straight / "metrics.jsonl")) == 6


def test_sigkill_at_several_points_and_resume(straight: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, inside a step (saved at inner update 1 of 2), and between a
    checkpoint and its log. At random times and more often: test_kills.py.
    """
    out = tmp_path / "run"
    kill_when(out, 1, 0.0)
    kill_when(out, 2, 0.05, "--resume")
    kill_when(out, 4, 0.1, "--resume")
    finish(out, "--resume")
    assert_same_run(out, straight)


def test_the_head_and_shares_by_prompt_resume_with_the_run(tmp_path: Path) -> None:
    """Killed inside a step: the head, its optimiser, the open step's draws, and what was learned of
    each prompt come back.
    """
    joint = (
        "decode.select=eb",
        "sampler.mode=joint",
        "estimator.name=two_mean_field",
        "loss.is_cap=2.0",
        "train.num_prompts=4",
    )
    joint += (
        "prior.name=anchors",
        "prior.adapt_share=true",
        "prior.share=0.5",
    )
    joint += ("run.save_every=1", "train.prompts_per_step=4", "train.steps=3")
    finish(tmp_path / "straight", *joint)
    kill_when(tmp_path / "run", 2, 0.1, *joint)
    finish(tmp_path / "run", *joint, "--resume")
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    ours, theirs = (
        load_file(tmp_path / n / "model" / "threshold.safetensors") for n in ("run", "straight")
    )
    assert all(ours[k].equal(theirs[k]) for k in theirs)
    steps = rows(tmp_path / "run" / "metrics.jsonl")
    assert steps[-1]["sampler/entropy"] > 0 and len({row["prior/share"] for row in steps}) > 1


def cut_back(straight: Path, out: Path, newest: str) -> list[str]:
    """A copy of the finished run as it stood when ``newest`` was written, with later lines in its
    logs; the names of its checkpoints.
    """
    shutil.copytree(straight, out)
    for folder in (out / "checkpoints").iterdir():
        if folder.name > newest:
            shutil.rmtree(folder)
    for name in ("model", "model-raw"):
        shutil.rmtree(out / name)
    for name in ("summary.json", "report.html"):
        (out / name).unlink()
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_half_written_checkpoint_is_passed_over(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cut_back(straight, out, "update-000009")[-2:] == ["update-000006", "update-000009"]
    weights = out / "checkpoints" / "update-000009" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    finish(out, "--resume")
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint update-000009 is damaged" in said and "resumed from update-000006" in said
    assert_same_run(out, straight)


def test_full_disk_is_said_and_the_last_good_checkpoint_stays(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file-size limit of 1 MB stands in for the full disk: no weights can be written, before or
    at the end.
    """
    out = tmp_path / "run"
    good = cut_back(straight, out, "update-000006")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, kept[1]))
    try:
        code = main(words(out, "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    shown = capsys.readouterr()
    said = " ".join((shown.out + shown.err).split())
    assert code == 2 and "Traceback" not in said
    assert "could not be written" in said and "older ones are untouched" in said
    assert sorted(p.name for p in (out / "checkpoints").glob("update-*")) == good
    assert not list((out / "checkpoints").glob(".partial*"))


def test_resume_refuses_other_settings(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(straight, "optimizer.lr=0.5", "--resume")) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert main(words(straight)) == 2
    assert "--resume" in capsys.readouterr().err
