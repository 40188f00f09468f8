"""Files that are new and whole, or as they were; JSON and JSONL in and out; what a dead process
left of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_PART = re.compile(r"\..+\.(\d+)(?:@(.+))?\.part")  # .NAME.PID@HOST.part
_BLOCK = 2**22  # bytes


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows, one JSON object per line, in one write."""
    append_text(path, "".join(json_text(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a JSONL file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1
    ):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(
                    f"{path}:{number} is no JSON object; correct or delete that line"
                ) from None
    return rows


def check_output(path: str | Path, option: str) -> None:
    """Refuse, before any work is done, a file that could not be written at the end."""
    file = Path(path)
    if not file.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {file.parent} does not exist; make it first")
    if file.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, sync it and rename it: ``path`` is new and whole, or as
    it was.

    OSError names the file. What a dead process left of the same file is removed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}@{host_name()}.part")
    remove_left_parts(path.parent, path.name)
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes files that only their owner can read
        sync(part)
        os.replace(part, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path} could not be written ({error})") from None
    except OSError as error:
        raise named(error, path) from None
    finally:
        part.unlink(missing_ok=True)


def json_text(data: Any, **options: Any) -> str:
    """``json.dumps`` as every JSON reader understands it: NaN is null, an infinity the string that
    ``float`` reads back.
    """
    return json.dumps(_finite(data), allow_nan=False, **options)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append in one write; OSError names the file (a full disk does not)."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise named(error, path) from None


def named(error: OSError, path: Path) -> OSError:
    """The same error with the file that a user knows in it."""
    if error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(path))


def sync(path: Path) -> None:
    """Wait until a file (or a folder's list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def free_name(path: Path) -> Path:
    """``NAME-old-1.ext`` (a folder's name has no .ext), or the first such name that is not
    taken.
    """
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    number = 1
    while os.path.lexists(candidate := path.with_name(f"{stem}-old-{number}{suffix}")):
        number += 1
    return candidate


def remove_left_parts(folder: Path, name: str | None = None) -> None:
    """Delete ``write_whole``'s temporary files of dead processes of this machine; ``name``: those
    of one file only.
    """
    for part in folder.glob("*.part" if name is None else f".{_literal(name)}.*.part"):
        found = _PART.fullmatch(part.name)
        if found is None or found[2] not in (None, host_name()) or is_alive(int(found[1])):
            continue
        part.unlink(missing_ok=True)


def host_name() -> str:
    """This machine's name, as it may stand in a file's name."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None if it is gone, dead or (no
    /proc) not known.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(pid: int, started: int | None = None) -> bool:
    """Whether a process of this machine runs; with ``started``, whether it is that one and not a
    later one of its number.
    """
    if Path("/proc/self/stat").exists():
        found = process_start(pid)
        return found is not None and started in (None, found)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        if math.isnan(data):
            return None
        return data if math.isfinite(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, dict):
        return {_finite_key(key): _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def _finite_key(key: Any) -> Any:
    return key if not isinstance(key, float) or math.isfinite(key) else str(key)


def _literal(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError in one line if it is missing or something else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a checkpoint folder with {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the second: thousands of brackets in each other
        raise ValueError(
            f"{path} is not valid JSON ({error}); write or download it again"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; expected an object")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write JSON aside and rename: a reader sees the old file or the new one."""
    write_text(path, json_text(data, indent=1) + "\n")
