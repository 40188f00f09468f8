"""`unmaskrl report`: a run as one HTML file, or several side by side."""

from __future__ import annotations

from pathlib import Path

from ...reporting.compare import write_comparison
from ...reporting.html import write_report
from ...utils.files import check_output
from ...utils.terminal import PlainConsole
from ..arguments import ReportArguments


def report_command(args: ReportArguments) -> int:
    """unmaskrl report."""
    folders = [Path(folder) for folder in args.folders]
    if len(folders) == 1:
        line = f"report: {write_report(folders[0])}"
    else:
        check_output(args.out, "--out")
        line = f"comparison: {write_comparison(folders, Path(args.out))}"
    PlainConsole().print(line, soft_wrap=True)
    return 0
