"""A rollout in a notebook: its tokens in the colour of the call that revealed them.

A notebook has no style sheet of ours, so every style stands beside its token.
"""

from __future__ import annotations

from html import escape
from typing import Any

from ..core.types import Rollout
from .trajectory import Cell, cells

_TILE = (
    "display:inline-flex;flex-direction:column;align-items:center;margin:1px;padding:1px 6px;"
    "border-radius:4px;font:13px/1.3 ui-monospace,Menlo,Consolas,monospace;border:2px solid "
)


def rollout_html(rollout: Rollout, most: int = 8) -> str:
    """The first ``most`` completions as HTML; the number under a token is the call that revealed
    it. Ids stand for tokens where the denoiser does not say how they read.
    """
    shown = [_row_html(rollout, index) for index in range(min(most, len(rollout.ids)))]
    rest = len(rollout.ids) - len(shown)
    note = f"<p>and {rest} more rows</p>" if rest else ""
    return f"<div>{escape(repr(rollout))}</div>{''.join(shown)}{note}"


def _row_html(rollout: Rollout, index: int) -> str:
    name = f"row {int(rollout.row_ids[index])}, {int(rollout.nfe[index])} calls"
    tiles = "".join(map(_tile, cells(rollout_row(rollout, index))))
    return f'<div style="margin:.4em 0"><small>{name}</small><div>{tiles}</div></div>'


def rollout_row(rollout: Rollout, index: int) -> dict[str, Any]:
    """What ``trajectory.cells`` reads of one row."""
    columns = rollout.asked
    ids = rollout.ids[index, columns].tolist()
    return {
        "pieces": rollout.pieces(ids) if rollout.pieces else [str(token) for token in ids],
        "decoded_step": rollout.decoded_step[index, columns].tolist(),
        "logps": rollout.behavior_logps[index, columns].double().tolist(),
        "exit": rollout.exit_mask[index, columns].tolist(),
        "nfe": int(rollout.nfe[index]),
    }


def _tile(cell: Cell) -> str:
    if cell.paint is not None:
        fill, ink = cell.paint
        style = f"{fill};background:{fill};color:{ink}"
    elif cell.anchor:
        style = "currentColor;font-weight:700;text-decoration:underline"
    else:
        style = "transparent;opacity:.55"
    label = f'<span style="font-size:10px;font-weight:400">{escape(cell.label)}</span>'
    return (
        f'<span title="{escape(cell.tip)}" style="{_TILE}{style}">{escape(cell.text)}{label}</span>'
    )
