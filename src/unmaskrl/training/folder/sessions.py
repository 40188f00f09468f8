"""run.json: when, how and with what each part of a run was started."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...utils.files import read_json, write_json
from ...utils.torch_setup import installed

RUN_FILE = "run.json"
_PACKAGES = ("unmaskrl", "torch", "transformers", "accelerate")
_SOURCE = Path(__file__).parents[2] / "__init__.py"


def add_session(folder: Path, num_processes: int) -> None:
    """Append this start of the command to run.json; a file that holds something else begins
    anew.
    """
    path = folder / RUN_FILE
    try:
        sessions = read_json(path).get("sessions")
    except (ValueError, OSError):
        sessions = None
    earlier = sessions if isinstance(sessions, list) else []
    write_json(path, {"sessions": [*earlier, this_session(num_processes)]})


def this_session(num_processes: int) -> dict[str, Any]:
    """Date (UTC), command line, folder, commits, versions and machine of this process."""
    here = Path.cwd()
    commits = {"this folder": commit_of(here)}
    if _is_tracked(_SOURCE):
        commits["unmaskrl"] = commit_of(_SOURCE.parent)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "folder": str(here),
        "commits": {place: commit for place, commit in commits.items() if commit},
        "versions": installed(*_PACKAGES) | {"python": platform.python_version()},
        "platform": platform.platform(),
        "processes": num_processes,
    }


def command_line(argv: list[str]) -> str:
    """The command as it could be typed again."""
    program = argv[0] if argv else ""
    words = ["unmaskrl"]
    if os.path.basename(program) not in ("unmaskrl", "__main__.py"):
        words = ["python", program]
    return shlex.join([*words, *argv[1:]])


def commit_of(place: Path) -> str | None:
    """The commit that is checked out at a place, ``-dirty`` if files were changed since; None
    outside of git.
    """
    return _git(place, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _is_tracked(path: Path) -> bool:
    """Whether a file is one of a git repository, and not merely inside its folder."""
    return _git(path.parent, "ls-files", "--error-unmatch", path.name) is not None


def _git(place: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(place), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
