"""Several runs in one page: what each reached and for what, and which settings differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.reporting.test_report import Outline, eval_row, make_run, write_lines
from unmaskrl.cli.main import main
from unmaskrl.reporting.compare import (
    comparison_charts,
    differing,
    judged,
    labels_of,
    write_comparison,
)
from unmaskrl.reporting.runs import StoredRun, load_run


def changed(folder: Path, steps: int = 120, **settings: Any) -> Path:
    """A run with other settings (section__key)."""
    make_run(folder, steps)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def finished(folder: Path, accuracy: float, n: int = 512) -> StoredRun:
    """A run that is nothing but its last evaluation."""
    folder.mkdir(parents=True)
    write_lines(folder / "eval.jsonl", [eval_row(9, "test", "raw", accuracy, n)])
    return load_run(folder)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        changed(tmp_path / "a", optimizer__lr=1e-4),
        changed(tmp_path / "b", 80, optimizer__lr=3e-4, estimator__name="espo"),
    ]


def test_a_comparison_shows_runs_and_what_differs(folders: list[Path], tmp_path: Path) -> None:
    path = write_comparison(folders, tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    words = " ".join(" ".join(Outline(text).text).split())
    assert "2 runs compared" in words
    assert "a 18.9% 62.3% 58.1-66.5% 13.9 600,000 8:12 120" in words.replace(" 14.0 ", " 13.9 ")
    assert "estimator.name elbo espo" in words and "optimizer.lr 0.0001 0.0003" in words
    assert "train.group_size" not in words and "decode.steps" not in words
    assert "http:" not in text and "https:" not in text and text.count("<script") == 1
    assert write_comparison(folders, path).read_text(encoding="utf-8") == text


def test_charts_are_by_step_calls_and_time(folders: list[Path]) -> None:
    runs = [load_run(folder) for folder in folders]
    sections = comparison_charts(["a", "b"], runs)
    assert [[chart.x for chart in group] for group in sections.values()] == [
        ["step", "row calls", "minutes"]
    ] * 2
    by_step, by_calls, by_time = (chart.lines[1].points for chart in sections["Held-out accuracy"])
    assert [x for x, _ in by_step] == [20, 40, 60]
    assert [x for x, _ in by_calls] == [100_000, 200_000, 300_000]  # 5,000 a step
    assert [x for x, _ in by_time] == pytest.approx([s * 4.1 / 60 for s in (20, 40, 60)])
    assert [y for _, y in by_step] == [y for _, y in by_calls] == [y for _, y in by_time]


def test_without_validation_the_test_problems_are_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    write_lines(folder / "eval.jsonl", [row for row in rows if row["split"] == "test"])
    chart = comparison_charts(["a"], [load_run(folder)])["Held-out accuracy"][0]
    assert [x for x, _ in chart.lines[0].points] == [0, 120]


def test_the_verdict_is_no_more_than_the_intervals_say(tmp_path: Path) -> None:
    low, high, near = (finished(tmp_path / str(a), a) for a in (0.2, 0.6, 0.59))
    said = judged(["low", "high", "near"], [low, high, near])
    assert said.startswith("high ended highest, at 60.0%.")
    assert "does not overlap with that of low." in said
    assert "The difference to near may be chance" in said
    assert judged(["x", "y"], [high, high]).startswith("x, y ended highest, at 60.0%. Intervals")
    assert judged(["x"], [high]).startswith("No verdict")


def test_runs_are_named_by_as_much_of_their_path_as_is_needed(tmp_path: Path) -> None:
    a, b, c = (finished(tmp_path / name, 0.5) for name in ("x/s0", "y/s0", "y/s1"))
    assert labels_of([a, c]) == ["s0", "s1"]
    assert labels_of([a, b, c]) == ["x/s0", "y/s0", "y/s1"]


def test_a_setting_that_one_run_lacks_differs(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / "a")), finished(tmp_path / "b", 0.5)]
    found = dict(differing(runs))
    assert found["optimizer.lr"] == ["0.0001", "-"] and "name" not in found


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = '<img src=x onerror="1">'
    folders = [changed(tmp_path / evil), changed(tmp_path / "b", estimator__name=evil)]
    text = write_comparison(folders, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text and text.count("&lt;img") > 3


def test_the_command(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.html"
    words = [str(folder) for folder in folders]
    assert main(["report", *words, "--out", str(out)]) == 0
    assert f"comparison: {out}" in capsys.readouterr().out and out.is_file()
    assert main(["report", words[0]]) == 0
    assert (folders[0] / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "nowhere"], "nowhere is no run folder (none of config.yaml"),
        (["a", "b", "a/"], "a is given twice; name runs that differ"),
        (["a", "b", "--out", "no/where.html"], "the folder no does not exist"),
    ],
)
def test_wrong_folders_are_one_line(
    folders: list[Path],
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders[0].parent)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert re.sub(r"\s+$", "", error).count("\n") == 0 and said in error
    assert not Path("comparison.html").exists()
