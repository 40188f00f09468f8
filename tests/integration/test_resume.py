"""A run that is killed with SIGKILL and resumed ends bit-equal to one that was left alone. Real
processes, real kills.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

SETTINGS = (
    "train.steps=6 train.prompts_per_step=4 train.group_size=4 train.num_iterations=2 "
    "run.save_every=3 run.threads=1 "
    "run.log_with=[] run.seed=3 eval.size=16 eval.size_during=8 eval.every=2 decode.steps=10 "
    "decode.exit_at=0.85"
).split()


def command(out: Path, *extra: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "unmaskrl.cli",
        "train",
        "sudoku-mini",
        *SETTINGS,
        f"run.out={out}",
        *extra,
    ]


def finish(out: Path, *extra: str) -> str:
    done = subprocess.run(command(out, *extra), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_when(out: Path, lines: int, delay: float, *extra: str) -> None:
    """Start a run and SIGKILL it ``delay`` seconds after metrics.jsonl has ``lines`` lines."""
    process = subprocess.Popen(
        command(out, *extra), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while (
        count_lines(out / "metrics.jsonl") < lines
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(path: Path) -> list[dict[str, object]]:
    """JSONL rows without anything that is a time."""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(out)
    return out


def assert_same_run(run: Path, straight: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        assert rows(run / name) == rows(straight / name), name
    for name in ("model", "model-raw"):
        ours, theirs = (load_file(p / name / "model.safetensors") for p in (run, straight))
        assert ours.keys() == theirs.keys()
        assert all(ours[k].equal(theirs[k]) for k in ours), name


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
    checkpoint and its log.
    """
    out = tmp_path / "run"
    kill_when(out, 1, 0.0)
    kill_when(out, 2, 0.05, "--resume")
    kill_when(out, 4, 0.15, "--resume")
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
        "loss.is_cap=2",
        "train.num_prompts=4",
    )
    joint += (
        "prior.name=anchors",
        "prior.adapt_share=true",
        "prior.share=0.5",
        "estimator.hide_anchors=false",
    )
    joint += ("run.save_every=1", "train.steps=3")
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


def test_half_written_checkpoint_is_passed_over(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill_when(out, 4, 0.3)
    newest = sorted((out / "checkpoints").glob("update-*"))[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = finish(out, "--resume")
    assert f"checkpoint {newest.name} is damaged" in " ".join(said.split())
    assert_same_run(out, straight)


def test_full_disk_is_said_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    """A file-size limit of 1 MB stands in for the full disk: no weights can be written, before or
    at the end.
    """
    out = tmp_path / "run"
    kill_when(out, 3, 0.0)
    good = sorted(p.name for p in (out / "checkpoints").glob("update-*"))
    limited = subprocess.run(
        command(out, "--resume"),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    said = " ".join((limited.stdout + limited.stderr).split())
    assert limited.returncode == 2 and "Traceback" not in said
    assert "could not be written" in said and "older ones are untouched" in said
    assert sorted(p.name for p in (out / "checkpoints").glob("update-*")) == good
    assert not list((out / "checkpoints").glob(".partial*"))


def test_resume_refuses_other_settings(straight: Path) -> None:
    done = subprocess.run(
        command(straight, "optimizer.lr=0.5", "--resume"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "optimizer.lr" in done.stderr and "Traceback" not in done.stderr
    again = subprocess.run(
        command(straight), capture_output=True, text=True, timeout=120, env=os.environ.copy()
    )
    assert again.returncode == 2 and "--resume" in again.stderr
