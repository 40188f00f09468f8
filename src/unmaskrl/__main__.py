"""``python -m unmaskrl``: the command where it is not installed as one, and what `accelerate launch
-m` starts.
"""

import sys

from .cli.entry import main

sys.exit(main())
