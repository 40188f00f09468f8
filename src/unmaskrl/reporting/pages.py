"""Pages from templates: every text is escaped, and a page may load nothing and run one script.

A page is one file. Its content security policy forbids every request, and every script but
decoding.js, whose hash it holds: text in a log that got past the escaping would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..utils.plain_text import escape_controls
from .charts import CHART_CSS, Chart, chart_svg

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **context: Any) -> str:
    """A template of this package as a whole page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "decoding.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        **context,
        variables=Markup(CHART_CSS),
        script=Markup(f"<script>{script}</script>"),
        script_hash=Markup(f"'sha256-{digest}'"),
    )
    return escape_controls(page)


def drawn(sections: Mapping[str, Sequence[Chart]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Charts by section, for the template."""
    return [
        (
            section,
            [
                {"title": chart.title, "hint": chart.hint, "svg": Markup(chart_svg(chart))}
                for chart in charts
            ],
        )
        for section, charts in sections.items()
    ]
