"""``python -m unmaskrl.cli``: what `accelerate launch -m` starts."""

import sys

from ..__main__ import main

sys.exit(main())
