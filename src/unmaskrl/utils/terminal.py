"""What reaches the terminal: text as it is, no markup, no control characters of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from .plain_text import HIDDEN, escape_controls


class PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, nothing coloured by its
    looks, controls escaped.
    """

    def __init__(self, **options: object) -> None:
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, **options}
        super().__init__(**plain)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Rich's segments, cleaned; its own cursor controls are segments of another kind."""
        for segment in super().render(renderable, options):
            if segment.control or not HIDDEN.search(segment.text):
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)
