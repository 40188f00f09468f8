"""Where the command begins: ``unmaskrl``, ``python -m unmaskrl`` and ``python -m unmaskrl.cli``.

The library alone lacks what the command needs. So nothing but the standard library is imported
here before that is known.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

# What no command does without, of the extra [train]: module and package. matplotlib and tensorboard
# are asked for where a picture or a tracker is.
NEEDED = {
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "pydantic": "pydantic",
    "rich": "rich",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "typer": "typer",
    "yaml": "pyyaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command; 2 and one line if a package that it needs is missing."""
    missing = [package for module, package in NEEDED.items() if not _is_there(module)]
    if missing:
        sys.stderr.write(
            f"unmaskrl: error: the command needs {', '.join(missing)}, not installed here; "
            "run pip install 'unmaskrl[train]'\n"
        )
        return 2
    from .main import main as run

    return run(argv)


def _is_there(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return find_spec(module) is not None
    except ImportError:  # a finder that refuses
        return False
