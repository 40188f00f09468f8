"""unmaskrl init: what it writes and says, and what it leaves alone. That it runs:
tests/integration/test_init.py.
"""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from unmaskrl.cli.init import FILES, STARTER
from unmaskrl.cli.main import main


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True])
def test_the_files_are_those_of_the_package(
    there: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a b" / "own"
    if there:
        folder.mkdir(parents=True)
    assert main(["init", str(folder)]) == 0
    assert contents(folder) == {name: (STARTER / name).read_bytes() for name in FILES}
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said[:-1]] == [f"wrote {folder / n}" for n in FILES]
    assert said[-1].startswith(f"next: cd '{folder}' && unmaskrl train recipe.yaml ")


def test_the_current_folder_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "."]) == 0
    assert "next: unmaskrl train recipe.yaml " in capsys.readouterr().out
    assert set(contents(tmp_path)) == set(FILES)


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_task.py").write_text("mine")
    before = contents(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    for folder, said in (
        (tmp_path, "is not empty (link, own_task.py); name a new folder"),
        (tmp_path / "link", "is a link to nothing; name a new folder"),
        (tmp_path / "own_task.py", "is a file; name a new folder"),
        (tmp_path / "own_task.py" / "in", "own_task.py"),
    ):
        assert main(["init", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("unmaskrl: error: ") and err.count("\n") == 1
        assert said in err
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


def test_the_files_are_in_the_wheel() -> None:
    """pip copies what package-data names; nothing else lies beside it."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["unmaskrl"]
    names = {path.name for path in STARTER.iterdir() if path.name != "__pycache__"}
    assert names == set(FILES)
    for name in FILES:
        assert any(fnmatch(f"cli/starter/{name}", pattern) for pattern in patterns)
