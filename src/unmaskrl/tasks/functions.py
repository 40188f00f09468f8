"""Functions of the user's own, named 'package.module:function' in a recipe."""

from __future__ import annotations

import importlib
from typing import cast

from unmaskrl.tasks.base import TrlReward
from unmaskrl.tasks.contained import run_contained


def load_function(name: str, setting: str) -> TrlReward:
    """The function behind 'package.module:function'. Raises ValueError, naming the ``setting``, if
    there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        loaded, _ = run_contained(lambda: importlib.import_module(module))
        function = getattr(loaded, attribute)
    except KeyboardInterrupt:  # the user's
        raise
    # the module runs when it is imported: it may raise anything, or call sys.exit
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{setting}: cannot load {name!r} ({reason}); expected package.module:function"
        ) from None
    if not callable(function):
        raise ValueError(f"{setting}: {name!r} is a {type(function).__name__}, not a function")
    return cast(TrlReward, function)
