"""Nothing in a text of others moves the cursor, turns text around, or is read as markup."""

import io

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from unmaskrl.utils.plain_text import escape_controls, printable
from unmaskrl.utils.terminal import PlainConsole

HOSTILE = "a\x1b[31mred\x1b]0;title\x07 \x00\x08\r\x9b2J\u202eback\ud800 [bold]x[/y] :smile:"


def shown(*things: object, **options: object) -> str:
    out = io.StringIO()
    PlainConsole(file=out, width=200, **options).print(*things)
    return out.getvalue()


def test_controls_are_written_out_and_the_rest_is_kept() -> None:
    assert escape_controls("\x1b[31m") == "\\x1b[31m"
    assert (
        escape_controls("line\n\ttab ünï \U0001f600 \u200d") == "line\n\ttab ünï \U0001f600 \u200d"
    )
    assert escape_controls("\u202e\ud800\x9b") == "\\u202e\\ud800\\x9b"
    assert printable("two\nlines\x1b") == "two\\nlines\\x1b"


@pytest.mark.parametrize("wrap", [str, Text, Panel, lambda text: Panel(Text(text))])
def test_no_control_reaches_the_terminal(wrap: object) -> None:
    text = shown(wrap(HOSTILE))  # type: ignore[operator]
    assert not set(text) & set("\x1b\x07\x00\x08\r\x9b\u202e\ud800")
    assert "\\x1b[31mred" in text and "[bold]x[/y] :smile:" in text


def test_a_table_of_such_texts_is_drawn() -> None:
    table = Table("[/head]", title="[/x] title")
    table.add_row(HOSTILE)
    text = shown(table)
    assert "[/x] title" in text and "[/head]" in text and "\x1b" not in text


def test_own_colours_stay() -> None:
    out = io.StringIO()
    PlainConsole(file=out, force_terminal=True, color_system="standard").print(
        "x\x1by", style="yellow"
    )
    assert out.getvalue() == "\x1b[33mx\\x1by\x1b[0m\n"
