"""A run whose rollouts come from a server: faults of the server, kills of the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_block_causal import SETTINGS
from tests.runs import assert_same_run, ended, rows, start, two_ranks, wait_until
from tests.stub_server import THRESHOLD, Stub
from unmaskrl.cli.main import main

CHANGES = f"decode.select=confidence_threshold decode.gamma={THRESHOLD} optimizer.lr=0.001 "
CHANGES = f"{CHANGES} decode.temperature=2.0 decode.exit_at=null".split()


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    running = Stub(tmp_path_factory.mktemp("model") / "base")
    yield running
    running.stop()


def words(stub: Stub, out: Path, *extra: str) -> list[str]:
    engine = f"rollouts={{name: sglang, url: '{stub.url}', patience: 20.0, timeout: 20.0}}"
    model = f"model.path={stub.folder}"
    out_ = f"run.out={out}"
    return ["train", "countdown-mini", model, *SETTINGS, *CHANGES, engine, out_, "--quiet", *extra]


@pytest.fixture(scope="module")
def straight(stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    stub.loaded.clear()
    assert main(words(stub, out)) == 0
    return out


def test_a_run_on_a_server(straight: Path, stub: Stub) -> None:
    steps = rows(straight / "metrics.jsonl")
    assert len(steps) == 2
    assert all(row["grad_norm"] > 0 for row in steps)
    assert all(row["health/behavior_gap"] is not None for row in steps)
    labels = [version.rpartition("-")[0] for version in stub.loaded]
    assert labels[0] == "step-0" and {"step-0", "step-1", "step-2"} <= set(labels)
    assert len(set(stub.loaded)) == len(stub.loaded)  # each once
    assert not (straight / "served").exists() or len(list((straight / "served").iterdir())) <= 1


def test_faults_of_the_server_change_nothing(straight: Path, stub: Stub, tmp_path: Path) -> None:
    stub.faults.extend([lambda made: made] * 4)  # of the first contact
    stub.faults.extend([500, "drop", lambda made: made, 503])
    assert main(words(stub, tmp_path / "run")) == 0
    assert not stub.faults
    assert_same_run(tmp_path / "run", straight)


def test_a_killed_run_goes_on_as_if_it_was_not(straight: Path, stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(words(stub, out))
    wait_until((out / "checkpoints" / "update-000003").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stub.stop()
    stub.start()
    assert main(words(stub, out, "--resume")) == 0
    assert_same_run(out, straight)


def test_a_server_that_is_lost_ends_the_run_with_a_checkpoint(
    straight: Path, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    stub.faults.extend([lambda made: made] * 7 + ["die"])
    words_ = words(stub, out, "rollouts.patience=0.3")
    assert main(words_) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{stub.url} is away for 0.3 s" in said and "go on with --resume" in said
    assert list((out / "checkpoints").iterdir())
    stub.start()
    assert main([*words_, "--resume", "rollouts.patience=20.0"]) == 0
    assert_same_run(out, straight)


@pytest.mark.parametrize(
    ("change", "extra", "said"),
    [
        ({"step_maps": False}, [], "estimator.name=trajectory needs rollouts with step_maps"),
        ({"greedy": True}, [], "samples of one prompt at temperature 1 are equal"),
        ({"broken": True}, [], "of its greedy tokens"),
        ({"broken": True}, ["rollouts.agreement=0.0"], "less than those of a uniform draw"),
        ({"told": {"vocab_size": 9}}, [], "another model: its vocabulary is 9"),
        ({}, ["loss.is_cap=2.0"], "loss.is_cap needs rollouts with behavior_logps"),
        ({}, ["prior.name=anchors"], "prior.name=anchors needs rollouts with anchors"),
        ({}, ["decode.select=entropy", "decode.gamma=null"], "does not serve decode.select=entrop"),
        ({}, ["rollouts.url=nowhere"], "url: expected http://host:port"),
    ],
)
def test_what_is_refused_at_the_start(
    stub: Stub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    extra: list[str],
    said: str,
) -> None:
    kept = {name: getattr(stub, name) for name in change}
    for name, value in change.items():
        setattr(stub, name, value)
    try:
        assert main(words(stub, tmp_path / "run", *extra)) == 2
    finally:
        for name, value in kept.items():
            setattr(stub, name, value)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_step_maps_an_estimator_that_needs_none_trains(stub: Stub, tmp_path: Path) -> None:
    stub.step_maps = False
    out = tmp_path / "run"
    try:
        assert main(words(stub, out, "estimator={name: elbo}", "train.steps=1")) == 0
    finally:
        stub.step_maps = True
    (row,) = rows(out / "metrics.jsonl")
    assert row["grad_norm"] > 0 and row["health/behavior_gap"] is None


def test_check_tells_the_engine(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*words(stub, Path("nowhere"))[1:-1]]
    assert main(["check", *command]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"rollouts: sglang at {stub.url}; rules confidence_threshold" in shown
    assert main(["check", "countdown-mini", "rollouts.name=sglang", "rollouts.url=http://a:1"]) == 2


def test_two_processes_end_alike(straight: Path, stub: Stub, tmp_path: Path) -> None:
    """Their rollouts are those of one process; a server that is lost by one is lost by both."""
    out = tmp_path / "two"
    done = ended(two_ranks(words(stub, out)))
    assert [code for code, *_ in done] == [0, 0], done
    ours, theirs = (rows(run / "metrics.jsonl") for run in (out, straight))
    assert [row["nfe/mean"] for row in ours] == [row["nfe/mean"] for row in theirs]
    stub.faults.extend([lambda made: made] * 14 + ["die"])
    done = ended(two_ranks(words(stub, tmp_path / "lost", "rollouts.patience=0.3")))
    stub.faults.clear()
    stub.start()
    assert [code for code, *_ in done] == [2, 2], done
    assert all("go on with --resume" in err for _, _, err in done), done
    assert list((tmp_path / "lost" / "checkpoints").iterdir())
