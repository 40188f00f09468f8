"""`unmaskrl eval` and `unmaskrl prior`: killed and started again they end in the same file; several
settings and seeds.
"""

from __future__ import annotations

import json
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_commands import refused, run
from tests.runs import num_lines, start, wait_until
from unmaskrl.evaluation.evaluate import wilson

EVAL = "eval mini --task countdown --threads 1".split()
SAMPLED = "--size 12 --temperature 1 --samples 2 --seeds 0,4 --batch-size 5".split()
TWO_WAYS = [
    "--decode",
    "select=entropy steps=24",
    "--decode",
    "select=eb gamma=0.1 temperature=0.5",
]


def kill_when(path: Path, lines: int, *argv: str) -> None:
    """Start a command and SIGKILL it as soon as a file has so many lines."""
    process = start(argv)
    wait_until(lambda: num_lines(path) >= lines, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists(), "the command ended before it could be killed"


def timeless(data: Any) -> Any:
    """JSON without anything that is a time."""
    if isinstance(data, dict):
        return {key: timeless(value) for key, value in data.items() if key != "seconds"}
    return [timeless(value) for value in data] if isinstance(data, list) else data


def load(path: Path) -> Any:
    return timeless(json.loads(path.read_text()))


def test_a_killed_evaluation_goes_on_to_the_same_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tmp_path / "straight.json"
    killed = tmp_path / "killed.json"
    items = tmp_path / "killed.items.jsonl"
    sampled = [*SAMPLED, "--size", "6"]
    kill_when(items, 1 + 28, *EVAL, *sampled, *TWO_WAYS, "--json", str(killed))
    lines = items.read_text().splitlines(keepends=True)
    assert 28 < len(lines) <= 1 + 2 * 2 * 12 and not killed.exists()
    # inside the third of four parts, in the middle of a line
    items.write_text("".join(lines[:28]) + lines[28][:40])
    said = refused(capsys, *EVAL, *sampled, "--json", str(killed))
    assert "other settings" in said and "configs" in said and str(items) in said
    code, said = run(capsys, *EVAL, *sampled, *TWO_WAYS, "--json", str(killed))
    assert code == 0 and "27 completions are there" in said.replace("\n", "")
    assert not items.exists(), "what is in the JSON file is kept once"
    assert run(capsys, *EVAL, *sampled, *TWO_WAYS, "--json", str(straight))[0] == 0
    assert load(killed) == load(straight)


def test_several_ways_and_seeds_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.json"
    items = tmp_path / "e.jsonl"
    code, said = run(capsys, *EVAL, *SAMPLED, *TWO_WAYS, "--json", str(out), "--items", str(items))
    assert code == 0 and "select=eb" in said and "sd, seeds" in said
    result = json.loads(out.read_text())
    assert (
        result["model"] == "mini"
        and result["task_settings"] == {"name": "countdown"}
        and result["seeds"] == [0, 4]
    )
    assert result["versions"].keys() >= {"unmaskrl", "torch"}
    slow, fast = result["configs"]
    assert (slow["decode"]["select"], slow["decode"]["temperature"]) == ("entropy", 1.0)
    assert (fast["decode"]["gamma"], fast["decode"]["temperature"]) == (0.1, 0.5) and fast[
        "label"
    ] == TWO_WAYS[3]
    assert (
        slow["decode"].keys()
        == fast["decode"].keys()
        >= {"gen_length", "block_length", "steps", "exit_at"}
    )
    assert slow["nfe"] > fast["nfe"] and slow["tokens_per_call"] < fast["tokens_per_call"]
    for entry in result["configs"]:
        assert len(entry["items"]) == 48 and entry["samples"] == 4 and entry["num_problems"] == 12
        assert [(i["seed"], i["sample"]) for i in entry["items"][:4]] == [
            (0, 0),
            (0, 1),
            (4, 0),
            (4, 1),
        ]
        assert entry["accuracy"] == sum(i["correct"] for i in entry["items"]) / 48
        own = [row["accuracy"] for row in entry["by_seed"]]
        assert entry["accuracy"] == pytest.approx(sum(own) / 2) and entry[
            "accuracy_sd"
        ] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
        assert (entry["accuracy_low"], entry["accuracy_high"]) == pytest.approx(
            wilson(entry["accuracy"], 12)
        )
        for item in entry["items"]:
            assert item["prompt"].startswith("numbers ") and item["parts"].keys() == {
                "correct",
                "format",
            }
    assert len({i["text"] for i in slow["items"][:4]}) > 1
    before = items.read_bytes()
    code, said = run(capsys, *EVAL, *SAMPLED, *TWO_WAYS, "--json", str(out), "--items", str(items))
    assert code == 0 and "96 completions are there" in said.replace("\n", "")
    assert json.loads(out.read_text()) == result and items.read_bytes() == before


def test_a_way_is_what_it_would_be_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy, one seed: the flat layout; another precision is another evaluation."""
    both = tmp_path / "both.json"
    alone = tmp_path / "alone.json"
    items = tmp_path / "i.jsonl"
    ways = ["--decode", "steps=12", "--decode", "decode.steps=24"]
    assert run(capsys, *EVAL, "--size", "6", *ways, "--json", str(both))[0] == 0
    assert (
        run(
            capsys,
            *EVAL,
            "--size",
            "6",
            "--json",
            str(alone),
            "--items",
            str(items),
            "decode.steps=24",
        )[0]
        == 0
    )
    flat = load(alone)
    assert flat["seed"] == 0 and flat["decode"]["steps"] == 24
    assert (
        flat["items"] == load(both)["configs"][1]["items"]
        and flat["items"] != load(both)["configs"][0]["items"]
    )
    said = refused(
        capsys,
        *EVAL,
        "--size",
        "6",
        "--items",
        str(items),
        "--dtype",
        "bfloat16",
        "decode.steps=24",
    )
    assert "different: dtype" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "0,1"], ["greedy", "2 seeds", "temperature"]),
        (["--seeds", "0,x"], ["--seeds", "0,x"]),
        (["--seeds", "1,1", "--temperature", "1"], ["--seeds", "repeats"]),
        (["--decode", "stepz=3"], ["decode.stepz", "'steps'"]),
        (["--decode", "steps"], ["decode.steps", "key=value"]),
        (["--decode", "temperature=hot"], ["temperature", "'hot'"]),
        (["--decode", "select=eb gamma=-1"], ["gamma", "-1"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--json", "/nowhere/e.json"], ["/nowhere", "make it first"]),
        (["--items", "/nowhere/e.jsonl"], ["/nowhere", "make it first"]),
        (["decode.temperature=0.5"], ["--temperature"]),
    ],
)
def test_bad_input_is_one_clear_line(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *EVAL, "--size", "2", *argv)
    for word in words:
        assert word in said, said


PRIOR = (
    "prior mini --task countdown --threads 1 --size 24 --samples 3 --temperature 1 "
    "--batch-size 7".split()
)


def test_a_killed_prior_goes_on_to_the_same_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tmp_path / "straight.jsonl"
    killed = tmp_path / "killed.jsonl"
    partial = tmp_path / "killed.jsonl.partial"
    prior = [*PRIOR, "--size", "12"]
    kill_when(partial, 1 + 12, *prior, "--out", str(killed))
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:10]) + lines[10][:25])
    assert not killed.exists()
    said = refused(capsys, *prior, "--seed", "1", "--out", str(killed))
    assert "different: seed" in said
    code, said = run(capsys, *prior, "--out", str(killed))
    assert code == 0 and "9 answers are there" in said.replace("\n", "") and not partial.exists()
    assert run(capsys, *prior, "--out", str(straight))[0] == 0
    assert killed.read_bytes() == straight.read_bytes()


def test_the_first_right_answer_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "three.jsonl"
    one = tmp_path / "one.json"
    assert run(capsys, *PRIOR, "--out", str(out))[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 24 and {row["num_samples"] for row in rows} == {3}
    assert all(row["correct"] == (row["num_correct"] > 0) for row in rows)
    assert all(row["sample"] == 0 for row in rows if not row["correct"])
    assert any(row["sample"] > 0 for row in rows) and not all(row["correct"] for row in rows)
    assert all(len(row["ids"]) == len(row["protected"]) == len(row["logps"]) for row in rows)
    assert any(any(row["protected"]) and not all(row["protected"]) for row in rows)
    said = refused(capsys, *PRIOR, "--temperature", "0", "--out", str(one))
    assert "3 samples" in said and "--temperature" in said


def test_rows_of_the_hub_that_nothing_could_match_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"numbers {n} 2 3 target 9", "answer": str(n)} for n in range(4, 8)
    ]
    hub = types.SimpleNamespace(
        load_dataset=lambda name, config: {"test": [*rows, {"prompt": "numbers 9", "answer": " "}]}
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    options = "--task jsonl --threads 1 task.data=some/rows task.verifier=exact".split()
    code, said = run(capsys, "eval", "mini", *options, "--json", str(tmp_path / "out.json"))
    assert code == 0 and "1 of 5 rows of some/rows can never be right and are left out" in " ".join(
        said.split()
    )
    assert json.loads((tmp_path / "out.json").read_text())["num_problems"] == 4
