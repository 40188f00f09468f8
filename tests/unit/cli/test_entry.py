"""Every way to start the command; and one line where the extra that it needs is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from unmaskrl.cli import entry

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
SCRIPT, _, FUNCTION = PROJECT["scripts"]["unmaskrl"].partition(":")
STARTS = {
    "unmaskrl": ["-c", f"import sys, {SCRIPT} as s; sys.exit(s.{FUNCTION}())"],
    "python -m unmaskrl": ["-m", "unmaskrl"],
    "python -m unmaskrl.cli": ["-m", "unmaskrl.cli"],
}
# What pip would have left out: a finder that answers before all others.
HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def started(words: list[str], folder: Path, hidden: set[str]) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(HIDDEN.format(names=hidden or "()"))
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


@pytest.mark.parametrize("start", STARTS)
def test_the_library_alone_says_what_to_install(start: str, tmp_path: Path) -> None:
    for hidden, said in (({"accelerate", "typer"}, "accelerate, typer"), ({"yaml"}, "pyyaml")):
        done = started([*STARTS[start], "train", "sudoku-mini"], tmp_path, hidden)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            f"unmaskrl: error: the command needs {said}, not installed here; run pip install "
            "'unmaskrl[train]'\n"
        )


def test_python_m_is_the_command(tmp_path: Path) -> None:
    done = started([*STARTS["python -m unmaskrl"], "--version"], tmp_path, set())
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("unmaskrl ")
    done = started([*STARTS["python -m unmaskrl"], "evl"], tmp_path, set())
    assert done.returncode == 2 and "no such command 'evl'" in done.stderr


def test_what_is_asked_for_is_the_extra() -> None:
    """But for what only pictures and trackers need."""
    extra = PROJECT["optional-dependencies"]["train"]
    names = {requirement.split(">=")[0] for requirement in extra}
    assert set(entry.NEEDED.values()) == names - {"matplotlib", "tensorboard"}
    for module in entry.NEEDED:
        assert import_module(module).__name__ == module
