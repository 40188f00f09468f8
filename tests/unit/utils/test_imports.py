"""Loading a user's own objects by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmaskrl.utils.imports import load_object


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test has a current folder and a search path of its own, and leaves no module behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_of_the_current_folder() -> None:
    Path("mine_here.py").write_text("def make(): return 3\n")
    assert load_object("mine_here:make", "loss.name")() == 3
    assert load_object("mine_here:make", "x") is load_object("mine_here:make", "x")


def test_a_file_by_its_path_imports_what_lies_beside_it() -> None:
    Path("parts").mkdir()
    Path("parts/beside_it.py").write_text("VALUE = 4\n")
    Path("parts/mine.py").write_text("from beside_it import VALUE\ndef make(): return VALUE\n")
    assert load_object("parts/mine.py:make", "loss.name")() == 4
    absolute = str(Path("parts/mine.py").resolve())
    assert load_object(f"{absolute}:make", "x") is load_object("parts/mine.py:make", "x")


def test_two_files_of_one_name_are_two_modules() -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "mine.py").write_text(f"def make(): return {folder!r}\n")
    assert load_object("a/mine.py:make", "x")() == "a"
    assert load_object("b/mine.py:make", "x")() == "b"


def test_a_local_file_hides_no_module_that_is_installed() -> None:
    Path("colorsys.py").write_text("def mine(): return 1\n")
    with pytest.raises(ValueError, match="colorsys has no 'mine'"):
        load_object("colorsys:mine", "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:make", "no module 'no_such_module' is installed or in "),
        ("no_such.inner:make", "no module 'no_such' is installed or in "),
        ("gone.py:make", "there is no file "),
        ("mine:other", "mine has no 'other'"),
        ("mine:VALUE", "is a int, which cannot be called"),
        ("mine:", "expected package.module:name or path/to/file.py:name"),
        (":make", "expected package.module:name or path/to/file.py:name"),
        ("broken:make", "cannot import 'broken:make' (ZeroDivisionError: division by zero)"),
        ("leaves:make", "cannot import 'leaves:make' (SystemExit: 3)"),
        ("needs:make", "cannot import 'needs:make' (ModuleNotFoundError: No module named 'xy_z')"),
        ("broken.py:make", "cannot import 'broken.py:make' (ZeroDivisionError"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name: str, said: str) -> None:
    Path("mine.py").write_text("VALUE = 3\n")
    Path("broken.py").write_text("1 / 0\n")
    Path("leaves.py").write_text("raise SystemExit(3)\n")
    Path("needs.py").write_text("import xy_z\n")
    with pytest.raises(ValueError, match=r"^loss\.name: ") as error:
        load_object(name, "loss.name")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
