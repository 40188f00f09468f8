"""What a killed process leaves in a log, and which logs are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unmaskrl.evaluation.item_log import ItemLog, described_model, described_problems
from unmaskrl.models.hub import ASSETS
from unmaskrl.tasks import load

SETTINGS = {"model": "mini", "seeds": (0, 1)}


def written(path: Path) -> list[str]:
    log = ItemLog.open(path, SETTINGS)
    log.append([{"row": 0}, {"row": 1}])
    log.append([{"row": 2}])
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    "rest", ["", '{"row": 3, "te', '{"row": 3}', '{"row"\n', "\0\0\0\n", "7\n"]
)
def test_a_last_line_that_is_not_whole_is_dropped_and_cut_off(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    text = "".join(written(path))
    path.write_text(text + rest)
    log = ItemLog.open(path, SETTINGS)
    assert log.rows == [{"row": 0}, {"row": 1}, {"row": 2}]
    assert path.read_text() == text
    log.append([{"row": 3}])
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()[1:]] == [0, 1, 2, 3]


@pytest.mark.parametrize("rest", ["", '{"settings": {"mo'])
def test_killed_before_the_first_line_was_written(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(rest)
    assert ItemLog.open(path, SETTINGS).rows == []
    assert written(path)[0] == json.dumps({"settings": {"model": "mini", "seeds": [0, 1]}}) + "\n"


def test_a_broken_line_inside_is_no_work_of_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    lines = written(path)
    path.write_text("".join([*lines[:2], "broken\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"items\.jsonl:3 is no JSON object"):
        ItemLog.open(path, SETTINGS)


def test_other_settings_and_other_files_are_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    text = "".join(written(path))
    with pytest.raises(ValueError, match=r"other settings \(different: seeds, size\)"):
        ItemLog.open(path, {"model": "mini", "seeds": (0,), "size": 3})
    assert path.read_text() == text
    path.write_text('{"id": "a", "ids": []}\n')
    with pytest.raises(ValueError, match="no log of an unfinished evaluation"):
        ItemLog.open(path, SETTINGS)
    with pytest.raises(ValueError, match="does not exist; make it first"):
        ItemLog.open(tmp_path / "nowhere" / "items.jsonl", SETTINGS)


def test_a_model_is_its_weights_and_problems_are_their_content(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "mini", tmp_path / "mini")
    assert described_model(str(tmp_path / "mini"))["weights"] == described_model("mini")["weights"]
    weights = tmp_path / "mini" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert described_model(str(tmp_path / "mini"))["weights"] != described_model("mini")["weights"]
    task = load("countdown")
    examples = task.examples("test")[:4]
    assert described_problems(task, examples) == described_problems(
        load("countdown"), list(examples)
    )
    assert described_problems(task, examples) != described_problems(task, examples[:3])
    assert described_problems(
        load("countdown", prompt_style="instruct"), examples
    ) != described_problems(task, examples)
