"""``python -m unmaskrl``, and the command ``unmaskrl``."""

from __future__ import annotations

import sys


def main() -> int:
    """The command line; one line where the packages of unmaskrl[train] are not installed."""
    try:
        from .cli.main import main as command
    except ModuleNotFoundError as error:
        if (error.name or "unmaskrl").startswith("unmaskrl"):
            raise
        sys.stderr.write(
            f"unmaskrl: error: the command needs {error.name}: pip install 'unmaskrl[train]'\n"
        )
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main())
