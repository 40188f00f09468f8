"""run.json: how each part of a run was started."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from unmaskrl.training.folder.sessions import add_session, command_line, commit_of, this_session


def test_every_start_is_kept(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    add_session(tmp_path, 1)
    add_session(tmp_path, 2)
    sessions = json.loads((tmp_path / "run.json").read_text())["sessions"]
    assert [s["processes"] for s in sessions] == [1, 2]
    assert before <= datetime.fromisoformat(sessions[0]["started"]) <= datetime.now(UTC)
    assert {"unmaskrl", "torch", "python"} <= sessions[0]["versions"].keys()


@pytest.mark.parametrize("text", ["", "[1]", '{"sessions": 3}', "{"])
def test_a_file_that_holds_something_else_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    add_session(tmp_path, 1)
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["/x/bin/unmaskrl", "train", "sudoku-mini"], "unmaskrl train sudoku-mini"),
        (["/x/unmaskrl/cli/__main__.py", "train", "a b"], "unmaskrl train 'a b'"),
        (["mine.py", "--x", "decode.exit_at=0.9"], "python mine.py --x decode.exit_at=0.9"),
    ],
)
def test_the_command_can_be_typed_again(argv: list[str], wanted: str) -> None:
    assert command_line(argv) == wanted


def test_commits_of_a_repository_and_of_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit_of(tmp_path / "missing") is None
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "mine"
    folder.mkdir()
    assert commit_of(folder) is None
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e"]
    subprocess.run([*git, "init", "-q"], check=True)
    (folder / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
    commit = commit_of(folder)
    assert commit is not None and len(commit) == 12
    (folder / "a").write_text("2")
    assert commit_of(folder) == f"{commit}-dirty"
    monkeypatch.chdir(folder)
    assert this_session(1)["commits"]["this folder"] == f"{commit}-dirty"
