"""SIGINT and SIGTERM end a run where a checkpoint is exact, soon, and say how to go on. Real
processes, real signals.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

SETTINGS = (
    "train.steps=4 train.prompts_per_step=4 train.group_size=4 train.num_iterations=2 "
    "run.save_every=100 run.threads=1 "
    "run.log_with=[] run.seed=3 eval.size=16 eval.size_during=8 eval.every=1 decode.steps=10 "
    "decode.exit_at=0.85 "
    "prior.name=anchors prior.adapt_to=0.5 prior.keep_end=null"
).split()
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


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


def start(line: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=hear_signals,
    )


def hear_signals() -> None:
    """A test run in the background may have been told to ignore SIGINT, and children inherit
    that.
    """
    for signum in CODES:
        signal.signal(signum, signal.SIG_DFL)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def finish(out: Path, *extra: str) -> str:
    done = subprocess.run(command(out, *extra), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows(path: Path) -> list[dict[str, object]]:
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in kept]


def newest(out: Path) -> dict[str, object]:
    return json.loads(
        (sorted((out / "checkpoints").glob("update-*"))[-1] / "state.json").read_text()
    )


def assert_same_run(run: Path, straight: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        assert rows(run / name) == rows(straight / name), name
    for name in ("model", "model-raw"):
        ours, theirs = (load_file(p / name / "model.safetensors") for p in (run, straight))
        assert all(ours[k].equal(theirs[k]) for k in theirs), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(out)
    return out


@pytest.mark.parametrize(
    ("signum", "delay"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.15), (signal.SIGINT, 0.4)]
)
def test_stopped_at_step_two_it_resumes_at_step_two(
    straight: Path, tmp_path: Path, signum: int, delay: float
) -> None:
    """No checkpoint is due by save_every: the signal writes it, and the hint, typed as it is, goes
    on from there.
    """
    out = tmp_path / "run"
    process = start(command(out))
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= 2, process)
    time.sleep(delay)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == CODES[signum] and "Traceback" not in err
    state = newest(out)
    assert state["step"] in (2, 3)
    assert f"stopped at step {state['step']} of 4" in err
    hint = err.split("go on with: ")[1].strip()
    assert hint.startswith("python -m unmaskrl.cli train sudoku-mini ") and hint.endswith(
        " --resume"
    )
    assert f"(step {state['step']}" in finish(out, "--resume")
    assert_same_run(out, straight)


def test_a_long_evaluation_is_left_at_once_and_not_done_twice(
    straight: Path, tmp_path: Path
) -> None:
    """In the base's evaluation nothing is lost but itself; in the first rollout, the evaluation
    before is kept.
    """
    out = tmp_path / "long"
    process = start(command(out, "eval.size=4096"))
    wait_until(lambda: (out / "threads.json").exists(), process)
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped at step 0 of 4" in err
    assert time.monotonic() - begin < 20 and not (out / "eval.jsonl").exists()
    out = tmp_path / "run"
    process = start(command(out))
    wait_until(lambda: num_lines(out / "eval.jsonl") >= 1, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert newest(out)["log_bytes"]["eval.jsonl"] > 0 and num_lines(out / "metrics.jsonl") == 0  # type: ignore[index]
    said = finish(out, "--resume")
    assert "eval test base" not in said
    assert_same_run(out, straight)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(command(out))
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= 1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    # 130: it was through with the first before the second came
    assert process.returncode in (130, 143)
    assert process.returncode == 130 or "stopped at once" in err


def two_ranks(out: Path, *extra: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    return [
        start(command(out, *extra), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    said = [rank.communicate(timeout=240) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def assert_near_run(run: Path, straight: Path) -> None:
    """Up to rounding in float64: a gathered block's memory is aligned as it happens to be, and sums
    round accordingly.
    """
    for ours, theirs in zip(
        rows(run / "metrics.jsonl"), rows(straight / "metrics.jsonl"), strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert all(
            ours[key] == pytest.approx(value, rel=1e-6, abs=1e-9) for key, value in theirs.items()
        )
    for name in ("model", "model-raw"):
        ours, theirs = (load_file(p / name / "model.safetensors") for p in (run, straight))
        assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 1e-9, name


LOCKSTEP = ("train.shard=fsdp", "train.gather_rollout=false", "model.dtype=float64")


@pytest.mark.parametrize("settings", [(), LOCKSTEP], ids=["whole", "lockstep"])
def test_ranks_stop_together_though_one_was_asked(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    whole = tmp_path / "whole"
    out = tmp_path / "run"
    assert [code for code, *_ in ended(two_ranks(whole, *settings))] == [0, 0]
    ranks = two_ranks(out, *settings)
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= 2, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    (code, _, err), (other, silent, nothing) = ended(ranks)
    assert (code, other) == (143, 143), err + nothing
    assert "on 2 processes" in err and "stopped at step" in err
    assert "unmaskrl" not in silent + nothing, "the other rank has nothing to add"
    state = newest(out)
    assert state["step"] in (2, 3) and state["inner"] == 0
    again = ended(two_ranks(out, *settings, "--resume"))
    assert [code for code, *_ in again] == [0, 0], again
    assert "Held-out accuracy" in again[0][1] and not again[1][1], "one table for all ranks"
    (assert_near_run if settings else assert_same_run)(out, whole)
