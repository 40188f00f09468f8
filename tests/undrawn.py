"""The command, whose report has no drawings, for processes that tests fork (``tests.runs``).

The sixteen drawings take longer than the runs of two steps that tests start; tests/unit/reporting
draws every chart. What commands import late is imported here, once for all of them.
"""

from collections.abc import Sequence

import accelerate  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401

import unmaskrl.cli.eval
import unmaskrl.cli.prior
import unmaskrl.cli.sft
import unmaskrl.cli.train  # noqa: F401
from unmaskrl.cli.main import main
from unmaskrl.reporting import pages


def undrawn(words: Sequence[str]) -> int:
    """The command's exit code."""
    pages.chart_svg = lambda chart: "<svg></svg>"
    return main(words)
