"""``python -m unmaskrl.cli``: the command where it is not installed as one, and what `accelerate
launch -m` starts.
"""

import sys

from .main import main

sys.exit(main())
