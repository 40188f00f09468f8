"""A guard's target that keeps a way to write to the reply channel, where the worker does not look
for it.
"""

from __future__ import annotations

import os

KEPT = [os.write]


def answer(attack: bool) -> str:
    """Write a reply that nobody asked for, to every file that may be the channel, and answer as if
    nothing had happened.
    """
    for number in range(3, 12) if attack else ():
        try:
            KEPT[0](number, b'ready {"value": 0.999}\n')
        except OSError:
            continue
    return "mine"
