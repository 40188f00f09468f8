"""SIGINT and SIGTERM end a run where a checkpoint is exact, soon, and say how to go on. Real
signals; real processes where the process counts.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.runs import (
    CODES,
    assert_same_run,
    ended,
    fresh,
    hear_signals,
    num_lines,
    rows,
    start,
    two_ranks,
    wait_until,
)
from unmaskrl.cli.main import main
from unmaskrl.training import held_out, loop
from unmaskrl.training.ranks.watched import Watched

SETTINGS = (
    "train.steps=4 train.prompts_per_step=2 train.group_size=4 train.num_iterations=2 "
    "run.save_every=100 run.threads=1 run.log_with=[] run.seed=3 run.probe=false "
    "task.train_size=20 eval.size=8 eval.batch_size=4 eval.size_during=2 eval.every=1 "
    "decode.steps=10 decode.exit_at=0.85 prior.name=anchors prior.adapt_to=0.5 prior.keep_end=null"
).split()


def words(out: Path, *extra: str) -> list[str]:
    return ["train", "sudoku-mini", *SETTINGS, f"run.out={out}", *extra]


def newest(out: Path) -> dict[str, object]:
    return json.loads(
        (sorted((out / "checkpoints").glob("update-*"))[-1] / "state.json").read_text()
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(words(out)) == 0
    return out


@pytest.fixture
def heard() -> Iterator[None]:
    """This process hears signals, whatever whoever started the tests has said."""
    kept = {signum: signal.getsignal(signum) for signum in CODES}
    hear_signals()
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


def signal_in(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, signum: int
) -> list[int]:
    """The signal comes to this process at the start of the ``call``-th call; the list holds the
    calls so far.
    """
    calls: list[int] = []
    count = itertools.count(1)
    original = getattr(owner, name)

    def signalled(*args, **kwargs):
        calls.append(next(count))
        if calls[-1] == call:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    return calls


def assert_goes_on(out: Path, straight: Path, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The hint, typed as it is, goes on from where the run was stopped to the same end."""
    state = newest(out)
    assert "Traceback" not in err and f"stopped at step {state['step']} of 4" in err
    hint = err.split("go on with: ")[1].strip()
    assert hint.endswith(" --resume")
    assert main(shlex.split(hint[hint.index("train sudoku-mini ") :])) == 0
    assert f"(step {state['step']}, inner update {state['inner']})" in capsys.readouterr().out
    assert_same_run(out, straight)


def test_a_stopped_process_resumes_where_it_was(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No checkpoint is due by save_every: the signal writes it."""
    out = tmp_path / "run"
    process = fresh(words(out))
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and newest(out)["step"] in (2, 3)
    assert "go on with: python -m unmaskrl train sudoku-mini " in err
    assert_goes_on(out, straight, err, capsys)


MOMENTS = {
    "rollout": (loop, "rollout_step", 3, signal.SIGTERM, (2, 0)),
    "first update": (loop, "update", 5, signal.SIGINT, (2, 1)),
    "last update": (loop, "update", 6, signal.SIGTERM, (3, 0)),
    "evaluation": (held_out, "evaluate", 4, signal.SIGINT, (2, 0)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_wherever_the_signal_comes_the_checkpoint_is_exact(
    moment: str,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    heard: None,
) -> None:
    owner, name, call, signum, place = MOMENTS[moment]
    out = tmp_path / "run"
    signal_in(monkeypatch, owner, name, call, signum)
    assert main(words(out)) == CODES[signum]
    state = newest(out)
    assert (state["step"], state["inner"]) == place
    assert_goes_on(out, straight, capsys.readouterr().err, capsys)


def test_a_long_evaluation_is_left_at_once_and_not_done_twice(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    heard: None,
) -> None:
    """In the base's evaluation nothing is lost but itself; in the first rollout, the evaluation
    before is kept.
    """
    out = tmp_path / "long"
    with monkeypatch.context() as patch:
        calls = signal_in(patch, Watched, "hidden", 3, signal.SIGTERM)
        assert main(words(out)) == 143
    assert calls == [1, 2, 3], "no denoiser call after the signal"
    assert "stopped at step 0 of 4" in capsys.readouterr().err
    assert not (out / "eval.jsonl").exists()
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(patch, loop, "rollout_step", 1, signal.SIGINT)
        assert main(words(out)) == 130
    log_bytes: Any = newest(out)["log_bytes"]
    assert log_bytes["eval.jsonl"] > 0 and num_lines(out / "metrics.jsonl") == 0
    capsys.readouterr()
    assert main(words(out, "--resume")) == 0
    assert "eval test base" not in capsys.readouterr().out
    assert_same_run(out, straight)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(words(out))
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= 1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    # 130: it was through with the first before the second came
    assert process.returncode in (130, 143)
    assert process.returncode == 130 or "stopped at once" in err


# what does not depend on how many processes computed it, but for rounding
COMPARED = (
    "step loss grad_norm reward/mean nfe/mean groups/live calls/total rollout/anchors prior/keep"
).split()


def assert_near_run(run: Path, straight: Path) -> None:
    """Up to rounding in float64: two ranks add up in another order than one process."""
    for ours, theirs in zip(
        rows(run / "metrics.jsonl"), rows(straight / "metrics.jsonl"), strict=True
    ):
        for key in COMPARED:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-9), key
    for name in ("model", "model-raw"):
        ours, theirs = (load_file(p / name / "model.safetensors") for p in (run, straight))
        assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 1e-9, name


DOUBLE = "model.dtype=float64"
LOCKSTEP = ("train.shard=fsdp", "train.gather_rollout=false")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks must come to, computed by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(words(out, DOUBLE)) == 0
    return out


@pytest.mark.parametrize("settings", [(), LOCKSTEP], ids=["whole", "lockstep"])
def test_ranks_stop_together_though_one_was_asked(
    alone: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Whole ranks go on as one process, sharded ones as two whole ranks: to the same end."""
    out = tmp_path / "run"
    ranks = two_ranks(words(out, DOUBLE, *settings))
    wait_until(lambda: num_lines(out / "metrics.jsonl") >= 2, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    (code, _, err), (other, silent, nothing) = ended(ranks)
    assert (code, other) == (143, 143), err + nothing
    assert "on 2 processes" in err and "stopped at step" in err
    assert "unmaskrl" not in silent + nothing, "the other rank has nothing to add"
    state = newest(out)
    assert state["step"] in (2, 3) and state["inner"] == 0
    again = words(out, DOUBLE, "--resume")
    if settings:
        first, second = ended(two_ranks(again))
        assert (first[0], second[0]) == (0, 0), (first, second)
        assert "Held-out accuracy" in first[1] and not second[1], "one table for all ranks"
    else:
        assert main(again) == 0
    assert_near_run(out, alone)
