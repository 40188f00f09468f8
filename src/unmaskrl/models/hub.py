"""Where a checkpoint is: a local folder, or a hub id that is downloaded into the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

# data only: the Python files of a repository are never fetched, so none can run
CHECKPOINT_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja")
TOKENIZER_PATTERNS = ("*.json", "merges.txt", "*.jinja")
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ASSETS = Path(__file__).parents[1] / "assets"


def checkpoint_folder(
    path: str | os.PathLike[str],
    revision: str | None = None,
    patterns: Sequence[str] = CHECKPOINT_PATTERNS,
) -> Path:
    """The folder of a checkpoint: ``path`` (of a run: its ``model/``), or the cache of the hub id
    ``owner/name``.

    Only files that match ``patterns`` are downloaded. ValueError in one line if there is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"model.revision {revision} belongs to a hub id, but {path} is a local folder; set "
                "it to null"
            )
        return model_inside(folder)
    owner = str(path).partition("/")[0]
    if not _HUB_ID.fullmatch(str(path)) or Path(owner).is_dir():
        raise ValueError(
            f"{path} is not a folder, nor a hub id (owner/name); give a checkpoint folder"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # offline, unknown, gated, disk full: each with a class of its own
        at = "" if revision is None else f" at {revision}"
        reason = (str(error) or "no message").splitlines()[0][:200]
        raise ValueError(
            f"{path} is not a folder and could not be downloaded{at} ({type(error).__name__}: "
            f"{reason}); go online, or run "
            f"`hf download {path}` on a machine that is and give the folder"
        ) from None


def model_inside(folder: Path) -> Path:
    """A run folder's ``model/``, any other folder itself. ValueError for folders of a run that hold
    no model.
    """
    inside = folder / "model"
    if (folder / "state.json").is_file():
        run = folder.parent.parent
        raise ValueError(
            f"{folder} is a checkpoint, for --resume alone; give the model of a finished run, "
            f"{run / 'model'}"
        )
    if not any(folder.glob("*.safetensors")) and any(
        (inside / name).is_file() for name in (CONFIG, ADAPTER)
    ):
        return inside
    if (folder / "config.yaml").is_file() and not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is a run that has not come to its end, so it holds no model/; go on with "
            "train --resume"
        )
    return folder


def asset(path: str) -> str:
    """The folder of a shipped checkpoint if ``path`` names one, else ``path``."""
    shipped = ASSETS / path
    return str(shipped) if path and shipped.is_dir() else path
