"""The commands as a user types them, on tiny settings; and bad input: one line, a non-zero exit code, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmaskrl.cli import main

TINY = (
    "train.steps=2 train.prompts_per_step=4 train.group_size=4 train.num_iterations=2 train.threads=1 train.log_with=[] "
    "eval.size=16 eval.size_during=8 eval.every=1 decode.steps=10"
).split()
REWARDS = """
def length(prompts, completions, **columns):
    assert len(prompts) == len(completions) == len(columns["puzzle"])
    return [len(text) / 1000 for text in completions]

def broken(prompts, completions, **columns):
    return [1.0]
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code, said = run(capsys, *argv)
    assert code == 2
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in said
    return errors[0]


@pytest.mark.parametrize("recipe", ["sudoku-mini", "countdown-mini-diffu", "countdown-zero-stp-paper"])
def test_train_then_eval_sample_and_report(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    settings = [s for s in TINY if recipe == "sudoku-mini" or not s.startswith("decode.")]
    code, said = run(capsys, "train", recipe, *settings, f"train.out={out}")
    assert code == 0 and "accuracy" in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["health/behavior_gap"] < 1e-4
        assert row["calls/rollout"] == pytest.approx(row["nfe/mean"] * 16)
    splits = [json.loads(line)["split"] for line in (out / "eval.jsonl").read_text().splitlines()]
    assert splits == ["test", "validation", "test", "test"]
    report = (out / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "") and "<svg" in report
    task = recipe.split("-")[0]
    code, said = run(capsys, "eval", str(out / "model"), "--task", task, "--size", "8", "--json", str(tmp_path / "e.json"))
    assert code == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert len(result["items"]) == result["num_problems"] == 8
    assert result["decode"]["steps"] == (10 if recipe == "sudoku-mini" else 24)
    code, said = run(capsys, "sample", str(out / "model"), "--task", task, "--index", "1")
    assert code == 0 and "call" in said


def test_user_rewards_by_trl_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    chosen = "train.reward_functions=[my_rewards:length]"
    assert run(capsys, "train", "sudoku-mini", *TINY, chosen, f"train.out={out}")[0] == 0
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.01 < row["reward/my_rewards:length"] < 0.2
    said = refused(
        capsys, "train", "sudoku-mini", *TINY, "train.reward_functions=[my_rewards:broken]", f"train.out={tmp_path / 'b'}"
    )
    assert "broken" in said
    said = refused(
        capsys, "train", "sudoku-mini", *TINY, "train.reward_functions=[my_rewards:absent]", f"train.out={tmp_path / 'c'}"
    )
    assert "absent" in said


def test_prior_file_feeds_spatial_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prior = tmp_path / "prior.jsonl"
    assert (
        run(capsys, "prior", "mini", "--task", "countdown", "--out", str(prior), "--size", "64", "--temperature", "1")[0] == 0
    )
    rows = [json.loads(line) for line in prior.read_text().splitlines()]
    assert len(rows) == 64 and all(len(r["ids"]) == len(r["protected"]) == len(r["logps"]) for r in rows)
    assert any(any(r["protected"]) and not all(r["protected"]) for r in rows)
    settings = [s for s in TINY if not s.startswith("decode.")]
    anchors = ["prior.name=anchors", "prior.keep=0.5", f"prior.source={prior}", "train.num_prompts=64"]
    out = tmp_path / "run"
    assert run(capsys, "train", "countdown-mini-elbo", *settings, *anchors, f"train.out={out}")[0] == 0
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["rollout/anchors"] > 3


def test_check_counts_calls(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(
        capsys, "check", "sudoku-mini-elbo", "train.prompts_per_step=2", "train.group_size=3", "estimator.num_mc=3"
    )
    assert code == 0
    numbers = {line.split("|")[0].strip(" │"): line for line in said.splitlines() if "│" in line}
    text = " ".join(numbers.values())
    # 6 rows x 20 calls; 6 x 3 views x 3 later inner updates; x 4 for reference and for current
    assert "120" in text and "54" in text and "72" in text
    code, said = run(capsys, "check", "sudoku-mini-elbo", "decode.block_length=20", "decode.exit_at=0.9")
    assert code == 0 and "warning" in said and "block_length" in said


def test_recipes_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    _, said = run(capsys, "recipes")
    for name in ("sudoku-mini", "countdown-zero-stp", "mini-base"):
        assert name in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check", "sudoku-mini", "decode.stepz=3"], ["decode.stepz", "'steps'"]),
        (["check", "sudoku-mimi"], ["sudoku-mimi", "sudoku-mini"]),
        (["check", "sudoku-mini", "decode.block_length=7"], ["block_length 7", "gen_length 20"]),
        (["check", "sudoku-mini", "decode.steps=21"], ["steps", "21"]),
        (["check", "sudoku-mini", "decode.temperature=0"], ["temperature"]),
        (["check", "sudoku-mini", "estimator.name=elbow"], ["elbow", "'elbo'"]),
        (["check", "sudoku-mini", "estimator.num_mcs=2"], ["num_mcs", "'num_mc'"]),
        (["check", "sudoku-mini", "task.name=suduko"], ["suduko", "'sudoku'"]),
        (["check", "sudoku-mini", "train.steps=many"], ["train.steps", "many"]),
        (["check", "sudoku-mini", "nonsense"], ["nonsense", "section.key=value"]),
        (["check", "sudoku-mini", "model.path=/nowhere"], ["/nowhere"]),
        (["eval", "/nowhere", "--task", "sudoku"], ["/nowhere", "not a folder"]),
        (["eval", "mini", "--task", "sudoku", "--data", "/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["eval", "mini", "--task", "sudoku", "--samples", "4"], ["temperature"]),
        (["eval", "mini", "--task", "sudoku", "decode.exit_at=2"], ["exit_at", "2"]),
        (["sample", "mini"], ["--prompt", "--task"]),
        (["sample", "mini", "--prompt", "numbers 3 777 target 9"], ["777"]),
        (["sample", "mini", "--task", "sudoku", "--index", "99999"], ["99999"]),
        (["report", "/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_input_is_one_clear_line(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *argv)
    for word in words:
        assert word in said, said


def test_bad_input_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    refused(capsys, "train", "sudoku-mini", "model.path=/nowhere", f"train.out={out}")
    refused(capsys, "train", "sudoku-mini", "train.prompts_per_step=999999", f"train.out={out}")
    assert not out.exists()
