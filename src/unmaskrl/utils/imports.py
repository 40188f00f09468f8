"""Objects of the user's own, named ``package.module:name`` or ``path/to/file.py:name``.

A module is looked for where Python looks, and last in the current folder; a file is read from its
path, relative to the current folder, and may import what lies beside it. The name is kept as it was
given, so a run that is resumed from the same folder finds the same object.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

EXPECTED = "expected package.module:name or path/to/file.py:name"


def is_outside(name: object) -> bool:
    """Whether a component's name points out of the package: ``where:name``."""
    return isinstance(name, str) and ":" in name


def load_object(name: str, setting: str) -> Callable[..., Any]:
    """The function (or class) behind ``module:name`` or ``file.py:name``.

    ValueError in one line, beginning with ``setting``, if the module or file is not there, raises
    while it is imported, has no such name, or if the name is nothing that can be called.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(f"{setting}: got {name!r}; {EXPECTED}")
    module = _import(where, name, setting)
    if not hasattr(module, attribute):
        raise ValueError(f"{setting}: {where} has no {attribute!r} (got {name!r}); {EXPECTED}")
    found = getattr(module, attribute)
    if not callable(found):
        raise ValueError(f"{setting}: {name!r} is a {type(found).__name__}, which cannot be called")
    return found


def _import(where: str, name: str, setting: str) -> ModuleType:
    is_file = where.endswith(".py")
    path = Path(where).resolve()
    if is_file and not path.is_file():
        raise ValueError(f"{setting}: there is no file {path} (got {name!r}); {EXPECTED}")
    # last, so that a file called random.py hides nothing that others import
    folder = str(path.parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return _import_file(path) if is_file else importlib.import_module(where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the module runs as it is imported: it may even call sys.exit
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            reason = f"no module {error.name!r} is installed or in {os.getcwd()}"
        raise ValueError(f"{setting}: cannot import {name!r} ({reason})") from None


def _import_file(path: Path) -> ModuleType:
    """The module of a file, run once per process."""
    key = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    module_name = f"unmaskrl_file_{path.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
