"""Where rows come from and how they are split: disjoint whatever the source, and clear words when
they cannot be read.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.offline_tasks import write_rows
from unmaskrl import tasks
from unmaskrl.tasks.base import SPLITS
from unmaskrl.tasks.math.gsm8k import GSM8K
from unmaskrl.tasks.sources import Source

ROWS = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(400)]


def questions(task: Any) -> dict[str, set[str]]:
    return {
        split: {example.fields["question"] for example in task.examples(split)} for split in SPLITS
    }


def test_one_file_is_split_by_hash(tmp_path: Path) -> None:
    task = GSM8K(data=write_rows(tmp_path / "all.jsonl", ROWS))
    parts = questions(task)
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 400
    assert 0.7 < len(parts["train"]) / 400 < 0.9 and min(map(len, parts.values())) > 20
    # A row keeps its split and its id when others come and go.
    half = questions(GSM8K(data=write_rows(tmp_path / "half.jsonl", reversed(ROWS[::2]))))
    assert all(half[split] <= parts[split] for split in SPLITS)
    assert {e.id for e in GSM8K(data=str(tmp_path / "half.jsonl")).examples("test")} <= {
        e.id for e in task.examples("test")
    }


def test_a_test_file_is_the_test_set_and_nothing_of_it_is_trained_on(tmp_path: Path) -> None:
    tests = [*ROWS[:30], {"question": "  what is 40 + 1? ", "answer": "#### 41"}]
    task = GSM8K(
        data=write_rows(tmp_path / "a.jsonl", ROWS),
        test_data=write_rows(tmp_path / "t.jsonl", tests),
    )
    parts = questions(task)
    assert parts["test"] == {row["question"] for row in tests}
    others = parts["train"] | parts["validation"]
    assert not others & parts["test"] and "What is 40 + 1?" not in others
    assert len(others) == 400 - 31 and not parts["train"] & parts["validation"]


def test_a_folder_has_a_file_per_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_rows(folder / "train.jsonl", ROWS[:300])
    write_rows(folder / "test.jsonl", ROWS[290:])
    parts = questions(GSM8K(data=str(folder)))
    assert len(parts["test"]) == 110 and len(parts["train"] | parts["validation"]) == 290
    write_rows(folder / "validation.jsonl", ROWS[280:300])
    parts = questions(GSM8K(data=str(folder)))
    assert (
        len(parts["test"]) == 110 and len(parts["validation"]) == 10 and len(parts["train"]) == 280
    )


def test_repeated_problems_stay_together_and_have_ids_of_their_own(tmp_path: Path) -> None:
    task = GSM8K(data=write_rows(tmp_path / "twice.jsonl", [*ROWS, *ROWS]))
    ids = [example.id for split in SPLITS for example in task.examples(split)]
    assert len(ids) == len(set(ids)) == 800
    assert sum(map(len, questions(task).values())) == 400


def test_the_first_rows_are_a_random_sample(tmp_path: Path) -> None:
    first = [
        int(e.fields["question"].split()[2])
        for e in GSM8K(data=write_rows(tmp_path / "a.jsonl", ROWS)).examples("train")
    ]
    assert sorted(first) != first and 100 < sum(first[:50]) / 50 < 300


def hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_hub_data_keeps_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None) -> dict[str, list[dict[str, str]]]:
        asked.append((name, config))
        return {"train": ROWS[:200], "test": ROWS[200:250], "socratic": ROWS[250:]}

    hub(monkeypatch, load)
    parts = questions(GSM8K(data="some/gsm8k"))
    assert asked == [("some/gsm8k", "main")]
    assert parts["test"] == {row["question"] for row in ROWS[200:250]}
    assert 5 < len(parts["validation"]) < 50 and len(parts["train"] | parts["validation"]) == 200


def test_test_problems_alone_can_be_evaluated_and_not_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub(monkeypatch, lambda name, config: {"test": [{"problem": "1+1?", "answer": "2"}] * 3})
    task = tasks.load("math", data="some/test-only", protocol="d1")
    assert len(task.examples("test")) == 3
    with pytest.raises(
        ValueError, match="'some/test-only' has no train problems: give data that has them"
    ):
        task.examples("train")


def test_what_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, config: str | None) -> None:
        raise ConnectionError("no route\nto host")

    hub(monkeypatch, lambda name, config: {"dev": ROWS})
    with pytest.raises(
        ValueError, match="'some/dev' has the splits dev, expected train, validation or test"
    ):
        GSM8K(data="some/dev").examples("test")
    hub(monkeypatch, offline)
    with pytest.raises(
        ValueError,
        match=r"'some/absent' cannot be loaded from the hub \(ConnectionError: no route\)",
    ) as info:
        GSM8K(data="some/absent").examples("test")
    assert "\n" not in str(info.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"needs the package datasets: pip install 'unmaskrl\[tasks\]'"
    ):
        GSM8K(data="some/other").examples("test")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"rows\.jsonl:52: got '\{', expected one JSON object"),
        (
            '{"question": "Who?"}',
            r"rows\.jsonl:52: got no column 'answer': expected one of question",
        ),
        (
            '{"Question": "Who?"}',
            r"rows\.jsonl:52: got no column 'question': did you mean 'Question'",
        ),
        (
            '{"question": null}',
            r"rows\.jsonl:52: got null in column 'question': give it a value or leave",
        ),
        (
            '{"question": "Who?", "answer": "nobody"}',
            r"rows\.jsonl:52: got answer 'nobody', expected one that ends",
        ),
        (
            "",
            "gives 1 train, 0 validation, 0 test rows, expected some in each split: give more "
            "rows, test_data",
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, line: str, words: str) -> None:
    path = Path(write_rows(tmp_path / "rows.jsonl", ROWS[100:151] if line else ROWS[:1]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=words) as info:
        GSM8K(data=str(path)).examples("train")
    assert "\n" not in str(info.value)


def test_other_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        GSM8K(data=str(tmp_path / "absent.jsonl")).examples("train")
    with pytest.raises(ValueError, match=r"a folder without train\.jsonl"):
        GSM8K(data=str(tmp_path)).examples("train")
    with pytest.raises(ValueError, match="test_data and split_column both"):
        Source(task="t", data="a", column="c", test_data="b", split_column="s")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: got an empty file"):
        GSM8K(data=str(tmp_path / "empty.jsonl")).examples("train")
