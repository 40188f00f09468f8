"""The README's Python runs, its tree names what exists, its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from unmaskrl.cli.arguments import Arguments
from unmaskrl.cli.main import parse

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_block_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert code.count("\n") <= 30
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    logps = scope["logps"]
    assert tuple(logps.shape) == tuple(scope["rollout"].ids.shape)
    assert bool(logps.requires_grad) and float(logps.detach().sum()) < 0
    assert "True" in capsys.readouterr().out or "False" in README


def test_commands_parse() -> None:
    lines = [
        line.split("#")[0].strip() for line in README.splitlines() if line.startswith("unmaskrl ")
    ]
    assert len(lines) >= 5
    for line in lines:
        assert isinstance(parse(shlex.split(line)[1:]), Arguments), line


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_tree_names_exist() -> None:
    (tree,) = re.findall(r"```\nsrc/unmaskrl/\n(.*?)```", README, re.S)
    room = ""
    for line in tree.splitlines():
        is_file = line.startswith("    ")
        names = re.findall(r"\b[a-z_]+\.py\b|\b[a-z]+/", line.strip().split("   ")[0])
        assert names
        for name in names:
            assert (ROOT / "src" / "unmaskrl" / (room if is_file else "") / name).exists(), name
        if not is_file:
            room = names[0]


def test_tables_come_from_committed_results() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.PAGES:
        text = page.read_text()
        assert "%" in tables.fill(text) and tables.fill(text) == text, (
            f"run benchmarks/tables.py: {page.name} is stale"
        )


def test_links_exist() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
