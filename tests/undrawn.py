"""``python -m tests.undrawn WORDS``: the command, whose report has no drawings.

The sixteen drawings take longer than the runs of two steps that tests start; tests/unit/reporting
draws every chart.
"""

import sys

from unmaskrl.cli.main import main
from unmaskrl.reporting import pages

pages.chart_svg = lambda chart: "<svg></svg>"
sys.exit(main())
