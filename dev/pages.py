"""Pages that are generated from tables in the code: ``python dev/pages.py`` writes them.

``--check`` writes nothing and fails if a page is not what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from unmaskrl.recipes.reference import Setting, components, settings, sft_settings

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- written by dev/pages.py; change the descriptions in src/unmaskrl/recipes/schema.py -->"


def settings_page() -> str:
    """Every setting of a recipe, by section; components with their own settings."""
    lines = [
        "# Settings",
        "",
        NOTE,
        "",
        "Every setting of a recipe. On the command line it is written `section.key=value`; in a",
        "YAML file it stands in its section. `unmaskrl settings NAME` shows the same, and",
        "`unmaskrl check RECIPE` shows what a recipe sets.",
        "",
    ]
    for section, rows in groupby(settings(), key=lambda one: one.name.partition(".")[0]):
        rows = list(rows)
        lines += [f"## {section}", "", *_table(rows), ""]
        for name, (meaning, keys) in components(section).items():
            lines += [f"**`{section}.name={name}`**: {_text(meaning)}", ""]
            if keys:
                lines += [*_table(keys), ""]
    lines += ["## Only for `unmaskrl sft`", "", *_table(sft_settings())]
    return "\n".join(lines).rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {"settings.md": settings_page}


def _table(rows: list[Setting]) -> list[str]:
    with_meaning = any(row.meaning for row in rows)
    head = ["setting", "default", "values", *(["meaning"] if with_meaning else [])]
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [f"`{row.name}`", f"`{row.default}`", row.values]
        cells += [row.meaning] if with_meaning else []
        table.append(f"| {' | '.join(_text(cell) for cell in cells)} |")
    return table


def _text(words: str) -> str:
    return words.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def main(words: list[str]) -> int:
    """Write the pages, or with --check compare them; the exit code."""
    stale = []
    for name, page in PAGES.items():
        path = DOCS / name
        text = page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in words:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in words:
        sys.stderr.write(f"not as generated: {', '.join(stale)}; run python dev/pages.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
