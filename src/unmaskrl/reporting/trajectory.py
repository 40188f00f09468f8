"""One decoding shown as a grid of tokens, coloured by the denoiser call that revealed them.

The input is a row of ``samples.jsonl`` (``sample_row`` makes one); the outputs are a rich
renderable for the terminal and a ``View`` for the pages' template. Colours run through viridis from
the first call to the last; the number of the call is printed under every token, so that nothing
depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.text import Text

# Every eighth colour of viridis (CC0): lightness rises evenly, also without colour vision.
_VIRIDIS = (
    "#440154",
    "#472d7b",
    "#3b528b",
    "#2c728e",
    "#21918c",
    "#28ae80",
    "#5ec962",
    "#addc30",
    "#fde725",
)
_MAX_PIECE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A token as it is shown; ``share`` in [0, 1] is its place among the calls, None if none
    revealed it.
    """

    text: str
    label: str
    tip: str = ""
    share: float | None = None
    anchor: bool = False
    exit: bool = False
    position: int = 0
    at: int = 0  # the call that revealed it; 0: given; above all calls: never
    size: int = 1  # tokens that it stands for
    chance: float | None = None  # probability of the token when it was chosen

    @property
    def unseen(self) -> bool:
        """Never revealed: neither given nor decoded."""
        return self.share is None and not self.anchor

    @property
    def marks(self) -> list[str]:
        """Class names of its tile in a page."""
        kinds = {"drawn": self.paint, "exit": self.exit, "anchor": self.anchor}
        return [name for name, held in {**kinds, "never": self.unseen}.items() if held]

    @property
    def chance_text(self) -> str:
        """The probability as data of its tile; empty if it is not known."""
        return "" if self.chance is None else f"{self.chance:.4f}"

    @property
    def width(self) -> int:
        """Terminal columns, one blank on each side."""
        return max(cell_len(self.text), cell_len(self.label)) + 2

    @property
    def paint(self) -> tuple[str, str] | None:
        """Background and ink; None where the page's own colours are used."""
        return None if self.share is None else (colour(self.share), ink_on(colour(self.share)))


def cells(row: dict[str, Any]) -> list[Cell]:
    """The tokens of a sample row; equal never-revealed neighbours share a cell. ValueError for no
    sample.
    """
    if not is_sample(row):
        raise ValueError(
            "a sample row needs pieces and decoded_step of one length; pass a row of samples.jsonl"
        )
    nfe = num_calls(row)
    exits = _column(row, "exit")
    logps = _column(row, "logps")
    result: list[Cell] = []
    # Revealed tokens get a key of their own, never-revealed ones share the key of their text.
    tokens = enumerate(zip(row["pieces"], row["decoded_step"], strict=True))
    for _, run in groupby(tokens, lambda t: str(t[1][0]) if t[1][1] > nfe else t[0]):
        (position, (piece, call)), *more = run
        text = visible(str(piece)) or "''"
        place = {"text": text, "position": position}
        if call > nfe:
            size = 1 + len(more)
            label = f"x {size}" if more else "-"
            tip = "never revealed"
            result.append(Cell(**place, label=label, tip=tip, at=nfe + 1, size=size))
        elif call < 1:
            tip = f"position {position}, given"
            result.append(Cell(**place, label="given", tip=tip, anchor=True))
        else:
            is_exit = bool(exits[position])
            logp = _finite(logps[position])
            result.append(
                Cell(
                    **place,
                    label=f"{call}{'*' * is_exit}",
                    tip=_tip(position, call, is_exit, logp),
                    share=(call - 1) / max(1, nfe - 1),
                    exit=is_exit,
                    at=call,
                    chance=None if logp is None else math.exp(min(0.0, logp)),
                )
            )
    return result


def is_sample(row: dict[str, Any]) -> bool:
    """Whether a row holds what the views need: ``pieces`` and integer ``decoded_step`` of the same
    length.
    """
    texts = row.get("pieces")
    steps = row.get("decoded_step")
    if not isinstance(texts, list) or not isinstance(steps, list) or not texts:
        return False
    return len(texts) == len(steps) and all(isinstance(s, int) for s in steps)


def trajectory_text(row: dict[str, Any], listing: bool = True) -> RenderableType:
    """For the terminal: the token grid in a panel and, if ``listing``, which tokens each call
    revealed.
    """
    shown = cells(row)
    prompt = Text(str(row.get("prompt", "")).strip(), style="bold")
    legend = _legend(shown, num_calls(row))
    body = Group(prompt, Text(_headline(row), style="dim"), Text(), _Grid(shown), Text(), legend)
    panel = Panel(body, padding=(0, 1), border_style="dim")
    return Group(panel, calls_listing(row)) if listing else panel


def print_trajectory(row: dict[str, Any], console: Console, *, graded: bool = True) -> None:
    """Print one decoding outside of a run; ``graded=False`` says nothing of reward and
    correctness.
    """
    hidden = {"step"} if graded else {"step", "reward", "correct"}
    console.print(trajectory_text({key: value for key, value in row.items() if key not in hidden}))


def calls_listing(row: dict[str, Any]) -> RenderableType:
    """``call 1: tokens it revealed`` for every call, each token after its position in the
    completion.
    """
    revealed: dict[int, list[tuple[int, str]]] = {}
    for position, (piece, call) in enumerate(zip(row["pieces"], row["decoded_step"], strict=True)):
        if 0 < call <= num_calls(row):
            revealed.setdefault(call, []).append((position, visible(str(piece))))
    lines = []
    for call, tokens in sorted(revealed.items()):
        line = Text(f"call {call:>2}: ", style="bold")
        for position, piece in tokens:
            line.append(f" {position}", style="not bold dim").append(f" {piece}", style="not bold")
        lines.append(line)
    # One long line (an exit call) would leave no room for a second column.
    short, long = ([x for x in lines if (x.cell_len > 28) == is_long] for is_long in (False, True))
    return Group(Columns(short, padding=(0, 3), column_first=True), *long)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A decoding for a page: its tiles, and what is said of it."""

    cells: list[Cell]
    calls: int
    headline: str
    summary: str
    verdict: str
    text: str


def view(row: dict[str, Any]) -> View:
    """A sample row for the template."""
    shown = cells(row)
    revealed = sum(c.share is not None for c in shown)
    calls = num_calls(row)
    correct = row.get("correct")
    verdict = {True: "right", False: "wrong"}[correct] if isinstance(correct, bool) else ""
    text = row.get("completion")
    return View(
        cells=shown,
        calls=calls,
        headline=_headline({key: value for key, value in row.items() if key != "correct"}),
        summary=f"{revealed} tokens revealed in {calls} denoiser calls",
        verdict=verdict,
        text=text if isinstance(text, str) else "",
    )


# What the marks of the tiles mean.
EXAMPLES = (
    (Cell(text="7", label="given", anchor=True), "anchor (given, not an action)"),
    (Cell(text="7", label="9*", share=1.0, exit=True), "filled by the exit call"),
    (Cell(text="7", label="-", at=1), "never revealed: the row had ended"),
)
RAMP = ",".join(_VIRIDIS)


def colour(share: float) -> str:
    """Viridis at ``share`` in [0, 1] as ``#rrggbb``, linear between every eighth colour."""
    place = min(1.0, max(0.0, share)) * (len(_VIRIDIS) - 1)
    at = min(int(place), len(_VIRIDIS) - 2)
    pair = zip(_channels(_VIRIDIS[at]), _channels(_VIRIDIS[at + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - at)):02x}" for a, b in pair)


def ink_on(background: str) -> str:
    """Black or white, whichever has the larger contrast (WCAG 2 relative luminance)."""
    return "#000000" if luminance(background) > 0.179 else "#ffffff"


def luminance(hex_colour: str) -> float:
    """WCAG 2 relative luminance of ``#rrggbb``, 0 (black) to 1 (white)."""
    channels = [value / 255 for value in _channels(hex_colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def visible(piece: str) -> str:
    """A token's text with spaces at its ends as middle dots and control characters escaped."""
    core = piece.strip(" ")
    left = len(piece) - len(piece.lstrip(" "))
    right = len(piece) - left - len(core) if core else 0
    text = "\u00b7" * left + "".join(map(_escape, core)) + "\u00b7" * right
    return _shorten(text, _MAX_PIECE)


def _escape(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


def _shorten(text: str, size: int) -> str:
    return text if cell_len(text) <= size else set_cell_size(text, size - 3) + "..."


def _channels(hex_colour: str) -> tuple[int, ...]:
    return tuple(int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))


def num_calls(row: dict[str, Any]) -> int:
    nfe = row.get("nfe")
    return nfe if isinstance(nfe, int) else max(row["decoded_step"])


def _column(row: dict[str, Any], key: str) -> Sequence[Any]:
    """A per-token list of the row; all None if it is missing or of another length."""
    values = row.get(key)
    empty = [None] * len(row["pieces"])
    return values if isinstance(values, list) and len(values) == len(empty) else empty


def _tip(position: int, call: int, is_exit: bool, logp: float | None) -> str:
    tip = f"position {position}, call {call}" + (", exit call" if is_exit else "")
    return tip if logp is None else f"{tip}, log-prob {logp:.2f} nats"


def _finite(value: Any) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def _headline(row: dict[str, Any]) -> str:
    parts = [f"step {row['step']}"] if row.get("step") is not None else []
    parts += [f"{row.get('split', '')} {row.get('id', '')}".strip()]
    if isinstance(row.get("correct"), bool):
        parts.append(f"correct: {'yes' if row['correct'] else 'no'}")
    parts.append(f"{num_calls(row)} calls")
    if isinstance(row.get("reward"), int | float):
        named = row.get("parts")
        known = named.items() if isinstance(named, dict) else ()
        scores = ", ".join(f"{k} {v:g}" for k, v in known if _finite(v) is not None)
        parts.append(f"reward {row['reward']:.2f}" + (f" ({scores})" if scores else ""))
    if isinstance(row.get("temperature"), int | float):
        parts.append(f"T={row['temperature']:g}")
    return " | ".join(part for part in parts if part)


def _wrap(shown: Sequence[Cell], sizes: Sequence[float], limit: float) -> Iterator[list[Cell]]:
    """Lines of cells whose sizes add up to at most ``limit``."""
    line: list[Cell] = []
    used = 0.0
    for cell, size in zip(shown, sizes, strict=True):
        if line and used + size > limit:
            yield line
            line = []
            used = 0.0
        line.append(cell)
        used += size
    if line:
        yield line


@dataclass(frozen=True, slots=True)
class _Grid:
    """Cells flowing into lines of the console's width: tokens above, calls below."""

    cells: Sequence[Cell]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        sizes = [float(cell.width + 1) for cell in self.cells]
        for line in _wrap(self.cells, sizes, options.max_width + 1.0):
            top = Text()
            bottom = Text()
            for cell in line:
                width = min(cell.width, options.max_width)
                token = Text(_shorten(cell.text, width - 2))
                if cell.anchor:  # underline the token, not the blanks around it
                    token.stylize("bold underline")
                token.align("center", width)
                token.stylize(_style(cell))
                label = Text(cell.label, style="dim" if cell.unseen else "")
                label.align("center", width)
                top.append_text(token).append(" ")
                bottom.append_text(label).append(" ")
            yield from (top, bottom)


def _style(cell: Cell) -> Style:
    if cell.paint is None:
        return Style(dim=cell.unseen)
    background, ink = cell.paint
    return Style(color=ink, bgcolor=background, italic=cell.exit)


def _legend(shown: Sequence[Cell], nfe: int) -> Text:
    line = Text("call 1 ")
    for i in range(8):
        line.append("  ", style=Style(bgcolor=colour(i / 7)))
    line.append(f" call {nfe}")
    if any(c.anchor for c in shown):
        line.append("   ").append("given", style=Style(bold=True, underline=True)).append(" anchor")
    if any(c.exit for c in shown):
        line.append("   9* exit call")
    if any(c.unseen for c in shown):
        line.append("   ").append("dim", style=Style(dim=True)).append(" never revealed")
    return line
