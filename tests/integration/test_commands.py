"""The commands as a user types them, on tiny settings; and bad input: one line, a non-zero exit
code, nothing written.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmaskrl.cli.main import main

TINY = (
    "train.steps=2 train.prompts_per_step=4 train.group_size=4 train.num_iterations=2 "
    "run.threads=1 run.log_with=[] "
    "eval.size=8 eval.size_during=4 eval.every=1 decode.steps=10"
).split()
REWARDS = """
def length(prompts, completions, **columns):
    assert len(prompts) == len(completions) == len(columns["puzzle"])
    return [len(completion[0]["content"]) / 1000 for completion in completions]

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


@pytest.mark.parametrize(
    "recipe", ["sudoku-mini", "countdown-mini-diffu", "countdown-zero-stp-paper"]
)
def test_train_then_eval_sample_and_report(
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    drawn = recipe == "sudoku-mini"
    if drawn:
        request.getfixturevalue("charts_drawn")
    out = tmp_path / "run"
    settings = [s for s in TINY if recipe == "sudoku-mini" or not s.startswith("decode.")]
    settings.append("task.train_size=100")
    code, said = run(capsys, "train", recipe, *settings, f"run.out={out}")
    assert code == 0 and "accuracy" in said
    assert said.count("memory plan: RAM") == 1 and "fits (" in said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["health/behavior_gap"] < 1e-4
        assert row["calls/rollout"] == pytest.approx(row["nfe/mean"] * 16)
    splits = [json.loads(line)["split"] for line in (out / "eval.jsonl").read_text().splitlines()]
    assert splits == ["test", "validation", "validation", "test", "test"]
    report = (out / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (report.count("<path") > 16) == drawn
    task = recipe.split("-")[0]
    code, said = run(
        capsys,
        "eval",
        str(out / "model"),
        "--task",
        task,
        "--size",
        "8",
        "--json",
        str(tmp_path / "e.json"),
    )
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
    assert run(capsys, "train", "sudoku-mini", *TINY, chosen, f"run.out={out}")[0] == 0
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.01 < row["reward/my_rewards:length"] < 0.2
    said = refused(
        capsys,
        "train",
        "sudoku-mini",
        *TINY,
        "train.reward_functions=[my_rewards:broken]",
        f"run.out={tmp_path / 'b'}",
    )
    assert "broken" in said
    said = refused(
        capsys,
        "train",
        "sudoku-mini",
        *TINY,
        "train.reward_functions=[my_rewards:absent]",
        f"run.out={tmp_path / 'c'}",
    )
    assert "absent" in said


def test_prior_file_feeds_spatial_pruning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = tmp_path / "prior.jsonl"
    assert (
        run(
            capsys,
            "prior",
            "mini",
            "--task",
            "countdown",
            "--out",
            str(prior),
            "--size",
            "64",
            "--temperature",
            "1",
        )[0]
        == 0
    )
    rows = [json.loads(line) for line in prior.read_text().splitlines()]
    assert len(rows) == 64 and all(
        len(r["ids"]) == len(r["protected"]) == len(r["logps"]) for r in rows
    )
    assert any(any(r["protected"]) and not all(r["protected"]) for r in rows)
    settings = [s for s in TINY if not s.startswith("decode.")]
    anchors = [
        "prior.name=anchors",
        "prior.keep=0.5",
        f"prior.source={prior}",
        "train.num_prompts=64",
    ]
    out = tmp_path / "run"
    assert (
        run(capsys, "train", "countdown-mini-elbo", *settings, *anchors, f"run.out={out}")[0] == 0
    )
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["rollout/anchors"] > 3


# references are longer
ALL_ANCHORS = "decode.gen_length=8 decode.block_length=8 decode.steps=8".split()
VARIANCE = "variance mini --task countdown --threads 1 --size 4 --draws 4".split()


def test_variance_of_estimators_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.json"
    png = tmp_path / "v.png"
    options = [
        "--keep",
        "0.3",
        "--exit-at",
        "0.7",
        "--samples",
        "2",
        "--json",
        str(out),
        "--plot",
        str(png),
    ]
    code, said = run(
        capsys,
        *VARIANCE,
        *options,
        "--estimators",
        "elbo,espo:num_mc=1,left_to_right",
        "decode.block_length=12",
    )
    assert code == 0 and "free+exit" in said and "8 rows, 4 draws each" in said
    result = json.loads(out.read_text())
    assert (result["num_rows"], result["num_problems"], result["left_out"]) == (8, 4, 0)
    assert result["decode"]["block_length"] == 12 and result["decode"]["exit_at"] == 0.7
    assert [e["name"] for e in result["estimators"]] == ["elbo", "espo:num_mc=1", "left_to_right"]
    assert 3 < result["rollouts"]["anchors"] < 9 and result["rollouts"]["exit_tokens"] > 1
    elbo, espo, exact = (e["versions"] for e in result["estimators"])
    assert (
        elbo["full"]["canvases"] == 3
        and 3 < elbo["free+exit"]["canvases"] <= 4
        and espo["free"]["canvases"] <= 2
    )
    for versions in (elbo, espo):
        full = versions["full"]
        free = versions["free"]
        assert (
            full["variance"] == pytest.approx(sum(full["rows"]) / 8, rel=1e-3)
            and full["variance"] > 0.1
        )
        value, low, high = free["ratio"]["variance"]
        assert value == pytest.approx(free["variance"] / full["variance"]) and low <= value <= high
        per_free = [v / f**2 for v, f in zip(free["rows"], free["free"], strict=True)]
        assert free["per_free"] == pytest.approx(sum(per_free) / 8, rel=1e-3)
        assert full["free"] > free["free"] == versions["free+exit"]["free"]
        assert full["mean"] < free["mean"]  # it also has to explain the anchors
    assert exact["free"]["ratio"]["variance"] is None and exact["full"]["variance"] < 1e-9
    assert png.read_bytes().startswith(b"\x89PNG")


def test_without_pruning_the_versions_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.json"
    assert (
        run(
            capsys,
            *VARIANCE,
            "--keep",
            "0",
            "--json",
            str(out),
            "decode.exit_at=null",
            "decode.steps=12",
        )[0]
        == 0
    )
    result = json.loads(out.read_text())
    full, free, pruned = result["estimators"][0]["versions"].values()
    assert result["rollouts"]["anchors"] == result["rollouts"]["exit_tokens"] == 0
    assert full["rows"] == free["rows"] == pruned["rows"] and pruned["ratio"][
        "variance"
    ] == pytest.approx([1, 1, 1])
    assert pruned["rose"] == pruned["rose_clearly"] == 0


def test_profiling_the_variance_changes_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    weights = []
    for draws in (0, 3):
        out = tmp_path / str(draws)
        settings = [
            *TINY,
            "train.group_size=2",
            "train.num_iterations=1",
            "eval.size=4",
            "eval.size_during=4",
        ]
        assert (
            run(
                capsys,
                "train",
                "sudoku-mini",
                *settings,
                f"run.variance_draws={draws}",
                f"run.out={out}",
            )[0]
            == 0
        )
        rows.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
        weights.append((out / "model-raw" / "model.safetensors").read_bytes())
        assert ("Variance of the likelihood" in (out / "report.html").read_text()) == (draws > 0)
    keys = ("likelihood/variance", "likelihood/variance_per_token")
    for plain, profiled in zip(*rows, strict=True):
        assert all(profiled.pop(key) > 0 for key in keys)
        assert {k: v for k, v in plain.items() if not k.startswith("seconds")} == {
            k: v for k, v in profiled.items() if not k.startswith("seconds")
        }
    assert len(rows[0]) == 2 and weights[0] == weights[1]


def test_check_counts_calls(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(
        capsys,
        "check",
        "sudoku-mini-elbo",
        "train.prompts_per_step=2",
        "train.group_size=3",
        "estimator.num_mc=3",
    )
    assert code == 0
    numbers = {line.split("|")[0].strip(" │"): line for line in said.splitlines() if "│" in line}
    text = " ".join(numbers.values())
    # 6 rows x 20 calls; 6 x 3 views x 3 later inner updates; x 4 for reference and for current
    assert "120" in text and "54" in text and "72" in text
    code, said = run(
        capsys, "check", "sudoku-mini-elbo", "decode.block_length=20", "decode.exit_at=0.9"
    )
    assert code == 0 and "warning" in said and "block_length" in said


def test_check_prints_a_memory_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "check", "sudoku-mini", "--processes", "2")
    assert (
        code == 0
        and "80 GB: fits (" in said
        and "24 GB: fits (" in said
        and "19 tokens of prompt" in said
    )
    code, said = run(
        capsys, "check", "elbo_grpo", "model.path=GSAI-ML/LLaDA-8B-Instruct", "model.dtype=bfloat16"
    )
    assert (
        code == 0
        and "24 GB: does not fit (" in said
        and "model.quantize=nf4" in said
        and "assumed" in said
    )
    code, said = run(capsys, "check", "sudoku-mini", "--processes", "0")
    assert code == 2 and "--processes must be at least 1, got 0" in said


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
        ([*VARIANCE, "--draws", "1"], ["--draws", "2", "1"]),
        ([*VARIANCE, "--size", "0"], ["--size", "0"]),
        ([*VARIANCE, "--estimators", "elbo,esbo"], ["'esbo'", "'espo'"]),
        ([*VARIANCE, "--estimators", "elbo:num_mk=2"], ["num_mk", "'num_mc'"]),
        ([*VARIANCE, "--estimators", "elbo:num_mc=two"], ["elbo:num_mc=two"]),
        ([*VARIANCE, "--estimators", "elbo:num_mc"], ["num_mc", "key=value"]),
        ([*VARIANCE, "--keep", "1.5"], ["keep", "1.5"]),
        ([*VARIANCE, "--exit-at", "2"], ["exit_at", "2"]),
        ([*VARIANCE, "--samples", "2", "--temperature", "0"], ["2 samples", "temperature"]),
        ([*VARIANCE, "--json", "/nowhere/v.json"], ["/nowhere"]),
        (
            [*VARIANCE, "--select-anchors", "random", "--keep", "1", *ALL_ANCHORS],
            ["--keep 1", "all anchors"],
        ),
        (["check", "sudoku-mini", "run.variance_draws=1"], ["variance_draws", "2"]),
    ],
)
def test_bad_input_is_one_clear_line(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *argv)
    for word in words:
        assert word in said, said


def test_variance_needs_references_for_anchors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 8 / (3 - 8 / 3): solvable, so the row is loaded, but by no steps of whole numbers, which a
    # reference is
    (tmp_path / "p.jsonl").write_text('{"numbers": [3, 3, 8, 8], "target": 24}\n')
    said = refused(capsys, *VARIANCE, "--data", str(tmp_path / "p.jsonl"))
    assert "no known reference answer" in said and "--keep" in said


def test_bad_input_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    refused(capsys, "train", "sudoku-mini", "model.path=/nowhere", f"run.out={out}")
    refused(capsys, "train", "sudoku-mini", "train.prompts_per_step=999999", f"run.out={out}")
    assert not out.exists()
