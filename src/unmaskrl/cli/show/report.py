"""`unmaskrl report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

from ...reporting.html import write_report
from ...utils.terminal import PlainConsole
from ..arguments import ReportArguments


def report_command(args: ReportArguments) -> int:
    """unmaskrl report."""
    PlainConsole().print(f"report: {write_report(Path(args.folder))}", highlight=False)
    return 0
