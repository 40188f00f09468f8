"""``python -m unmaskrl.cli``: the same as ``python -m unmaskrl``."""

import sys

from .entry import main

sys.exit(main())
