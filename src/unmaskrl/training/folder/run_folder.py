"""The folder of a run: its name, what a run writes into it, who may begin, go on or replace
it.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from ...recipes.files import read_mapping
from ...utils.files import free_name, named, remove_left_parts, sync
from ...utils.lock import LOCK, Lock, holder, refuse_holder

CONFIG = "config.yaml"
LOGS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")
# All that `train` and `sft` write. What else lies in a folder is somebody's own, and --force leaves
# such a folder alone.
FILES = (
    "config.yaml run.json threads.json trackers.json summary.json report.html "
    "eval.json metrics.jsonl eval.jsonl samples.jsonl "
    "*-old-[0-9]*.yaml *-old-[0-9]*.json *-old-[0-9]*.jsonl .lock .*.part .*.partial "
    "report.html.part"
).split()
WEIGHTS = (
    "*.safetensors *.safetensors.index.json *.json README.md *.jinja *.txt *.model "
    ".*.part .*.partial"
).split()
FOLDERS = {
    "checkpoints": ("*.safetensors", "state.json"),
    "tensorboard": ("events.out.tfevents.*", "hparams.yml"),
    "model": WEIGHTS,
    "model-raw": WEIGHTS,
    "adapter": WEIGHTS,
}
# a folder with nothing else was killed before its run began
_BEFORE_A_RUN = (LOCK, "threads.json", ".*.part")


def folder_of(out: str, name: str, seed: int) -> Path:
    """``run.out`` with the recipe's name and the seed in it; ValueError for anything else in
    braces.
    """
    try:
        words = [word for _, *word in string.Formatter().parse(out) if word[0] is not None]
    except ValueError:
        words = [["", "", ""]]
    fields = {
        "" if conversion or "{" in (spec or "") else field for field, spec, conversion in words
    }
    if not fields <= {"recipe", "seed"}:
        raise ValueError(
            f"run.out {out!r}: only {{recipe}} and {{seed}} are filled in; double other braces"
        )
    if "recipe" in fields and Path(name).name != name:
        raise ValueError(
            f"run.out {out!r}: the recipe's name {name!r} is no name of a folder; set name= or "
            "run.out="
        )
    try:
        filled = out.format(recipe=name, seed=seed)
    except ValueError as error:
        raise ValueError(f"run.out {out!r}: {error}; write {{recipe}} and {{seed}}") from None
    if not filled or "\0" in filled:
        raise ValueError(f"run.out {out!r} names no folder")
    return Path(filled)


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Refuse, before anything is built, a folder that a run may not begin, go on or be replaced in.
    Changes nothing.
    """
    if resume and force:
        raise ValueError("--resume goes on with a run and --force replaces it: give one of them")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"run.out {folder} is a link to nothing; name a folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.out {str(folder)!r} is a file; name a folder")
    if resume:
        if not folder.exists():
            raise ValueError(
                f"--resume: there is no run in {folder}; leave --resume out to start one"
            )
        if not (folder / CONFIG).exists():
            raise ValueError(
                f"--resume: {folder} holds no run ({CONFIG} is missing); put it back, or start anew"
            )
        return
    if not is_used(folder):
        return
    if not force:
        raise ValueError(_in_the_way(folder))
    refuse_replacing(folder)
    refuse_holder(folder / LOCK, str(folder), holder(folder / LOCK))


def _in_the_way(folder: Path) -> str:
    if _is_run(folder):
        return (
            f"{folder} already holds a run: add --resume to go on, --force to move it aside, or "
            "set run.out"
        )
    return f"{folder} holds files and no run: set run.out to another folder"


def is_used(folder: Path) -> bool:
    """Whether a folder holds anything that a new run must not be mixed with."""
    return folder.exists() and any(
        not _matches(path.name, _BEFORE_A_RUN) for path in folder.iterdir()
    )


def claim_folder(folder: Path, *, force: bool) -> tuple[Lock, list[str]]:
    """Make the folder of a new run and hold its lock; by ``force`` the run in it is moved aside
    first. Returns what to tell.
    """
    notes: list[str] = []
    if force and is_used(folder):
        refuse_replacing(folder)
        with_lock = hold_folder(folder)
        kept = free_name(folder)
        os.rename(folder, kept)
        with_lock.release()
        (kept / LOCK).unlink(missing_ok=True)
        notes.append(f"--force: the run that was in {folder} is now {kept}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold_folder(folder)
    if is_used(folder):  # another process was faster while this one loaded its model
        lock.release()
        raise ValueError(_in_the_way(folder))
    (folder / "threads.json").unlink(missing_ok=True)
    return lock, notes


def hold_folder(folder: Path) -> Lock:
    """The lock of a folder that is there; what dead processes left half-written in it goes."""
    try:
        lock = Lock.take(folder / LOCK, str(folder))
    except OSError as error:
        raise named(error, folder / LOCK) from None
    for inside in (
        folder,
        *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()),
    ):
        remove_left_parts(inside)
    return lock


def refuse_replacing(folder: Path) -> None:
    """ValueError unless a folder holds a run and nothing that a run does not write. Nothing is
    touched.
    """
    reason = _not_replaced(folder)
    if reason:
        raise ValueError(
            f"--force: {folder} is left alone, {reason}; set run.out to another folder, or move "
            "it yourself"
        )


def _not_replaced(folder: Path) -> str:
    if folder.is_symlink() or os.path.ismount(folder):
        return "it is a link or the root of a disk"
    whole = folder.resolve()
    for place, name in (
        (Path.cwd().resolve(), "the current folder"),
        (Path.home().resolve(), "the home folder"),
    ):
        if whole == place:
            return f"it is {name}"
        if whole in place.parents:
            return f"{name} lies in it"
    if not _is_run(folder):
        return f"it holds no run (no {CONFIG} of one)"
    foreign = next(_foreign(folder), None)
    return f"it holds {foreign}, which no run writes" if foreign else ""


def _is_run(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    try:
        data = read_mapping(folder / CONFIG)
    except (ValueError, OSError):
        return False
    return isinstance(data.get("train"), dict) and ("task" in data or "data" in data)


def _foreign(folder: Path) -> Iterator[str]:
    """Names in a folder that no run writes."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or (path.is_file() and not _matches(path.name, FILES)):
            yield path.name
        elif path.is_dir():
            known = FOLDERS.get(path.name)
            if known is None:
                yield f"{path.name}/"
                continue
            for inside in sorted(path.rglob("*")):
                if inside.is_symlink() or not (inside.is_dir() or _matches(inside.name, known)):
                    yield str(inside.relative_to(folder))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def cut_log(path: Path, size: int) -> list[str]:
    """Cut a log back to where a checkpoint was taken: whole lines, never longer, and never to
    nothing without a copy.

    Returns what to tell: a log that is shorter than the checkpoint says has lost lines.
    """
    if not path.exists():
        return (
            [f"{path} is missing, the checkpoint counts {size} bytes of it: it begins anew"]
            if size
            else []
        )
    found = path.stat().st_size
    notes = []
    if found < size:
        notes.append(
            f"{path} has {found} bytes, the checkpoint says {size}: lines are lost; the whole ones "
            "are kept"
        )
    if size == 0:
        if found:
            kept = free_name(path)
            os.replace(path, kept)
            notes.append(f"{path.name} begins anew; what it held is in {kept.name}")
        return notes
    with path.open("r+b") as file:
        whole = _end_of_lines(file, min(found, size))
        if whole < min(found, size) and found >= size:
            notes.append(
                f"{path} does not end a line where the checkpoint says; the whole lines before are "
                "kept"
            )
        file.truncate(whole)
    return notes


def sync_logs(folder: Path, names: tuple[str, ...] = LOGS) -> dict[str, int]:
    """Put the logs on the disk and say how long they are: a checkpoint must not know of lines that
    a power cut takes.
    """
    sizes = {}
    for name in names:
        path = folder / name
        if path.exists():
            sync(path)
        sizes[name] = path.stat().st_size if path.exists() else 0
    return sizes


def _end_of_lines(file: BinaryIO, size: int) -> int:
    """The end of the last whole line within the first ``size`` bytes."""
    block = 65536
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
