"""Reward functions of the user's own: by name in a recipe, or as callables."""

from __future__ import annotations

from collections.abc import Sequence

from unmaskrl.tasks.base import TrlReward
from unmaskrl.tasks.contained import run_contained
from unmaskrl.utils.imports import load_object

Reward = str | TrlReward
Rewards = Reward | Sequence[Reward]


def load_function(name: str, setting: str) -> TrlReward:
    """The function behind ``package.module:function`` or ``path/to/file.py:function``. Raises
    ValueError, naming the ``setting``, if there is none.
    """
    # The module runs when it is imported: what it does to the process is undone.
    function, _ = run_contained(lambda: load_object(name, setting))
    return function


def named_rewards(rewards: Rewards, setting: str) -> dict[str, TrlReward]:
    """Functions by name: of a string the string itself, of a callable its ``__name__``.

    A string twice counts once. Raises ValueError for a callable whose name is taken.
    """
    given = [rewards] if isinstance(rewards, str) or callable(rewards) else rewards
    named: dict[str, TrlReward] = {}
    for reward in given:
        if isinstance(reward, str):
            name = reward
            function = load_function(reward, setting)
        elif callable(reward):
            name = getattr(reward, "__name__", type(reward).__name__)
            function = reward
        else:
            raise ValueError(f"{setting}: got {reward!r}, expected a function or its name")
        if name in named and not isinstance(reward, str):
            raise ValueError(
                f"{setting}: two reward functions are named {name!r}: give each its own __name__"
            )
        named[name] = function
    return named
