"""`unmaskrl settings`: every setting of a recipe, its default and what it means."""

from __future__ import annotations

from rich.table import Table

from ...recipes.reference import Setting, components, find, settings, sft_settings
from ...utils.terminal import PlainConsole
from ..arguments import SettingsArguments


def settings_command(args: SettingsArguments) -> int:
    """unmaskrl settings."""
    console = PlainConsole()
    found = find(args.name) if args.name else settings()
    console.print(settings_table(found))
    if args.name is None:
        console.print("Only for `unmaskrl sft`", style="bold")
        console.print(settings_table(sft_settings()))
        console.print("one section or setting: unmaskrl settings decode", highlight=False)
    for section in dict.fromkeys(one.name for one in found):
        for name, (meaning, keys) in components(section).items():
            line = f"{section}.name={name}: {meaning}"
            console.print(line, highlight=False, markup=False)
            for key in keys:
                line = f"    {key.name} = {key.default}   ({key.values})"
                console.print(line, highlight=False, markup=False)
    return 0


def settings_table(rows: list[Setting]) -> Table:
    """Name, default, values and meaning, a line between sections."""
    table = Table("setting", "default", "values", "meaning", box=None, pad_edge=False)
    last = rows[0].section if rows else ""
    for row in rows:
        if row.section != last:
            table.add_row()
            last = row.section
        table.add_row(row.name, row.default, row.values, row.meaning)
    return table
