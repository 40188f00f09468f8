"""Text of others made harmless for a terminal and a page: control characters are written out.
Standard library only.
"""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, marks that turn the direction of text around, line
# separators, half characters
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]"
)


def escape_controls(text: str) -> str:
    """The text with control characters written out, as ``\\x1b``: a prompt cannot move the cursor
    or hide what follows.
    """
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def printable(text: str) -> str:
    """The same in one line."""
    return escape_controls(text).replace("\n", "\\n")
