"""pyproject's lower bound of torch is true of every name that is imported from its sub-modules.

Nothing is installed: a table says in which version a name (or a keyword that is used) first stood
in torch's documentation. A new import has to be looked up before it passes here.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
OLD = (2, 0)  # there for years
FIRST = {
    "torch.autograd.function.once_differentiable": OLD,
    "torch.nn.functional.logsigmoid": OLD,
    "torch.nn.functional.pad": OLD,
    "torch.utils._python_dispatch.TorchDispatchMode": OLD,
    "torch.utils.checkpoint.checkpoint": OLD,
    "torch._dynamo.backends.registry.lookup_backend": OLD,
    "torch.utils._triton.has_triton": (2, 2),
    "torch.distributed.device_mesh.init_device_mesh": (2, 2),
    "torch.distributed.tensor.DTensor": (2, 5),
    "torch.distributed.tensor.distribute_tensor": (2, 5),
    "torch.distributed.fsdp.FSDPModule": (2, 6),
    "torch.distributed.fsdp.fully_shard": (2, 6),
    "torch.distributed.fsdp.register_fsdp_forward_method": (2, 6),
}
KEYWORDS = {
    "fully_shard": {"mesh": (2, 6), "reshard_after_forward": (2, 6), "ignored_params": (2, 7)}
}


def lower_bound(package: str) -> tuple[int, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
        if found := re.fullmatch(rf"{package}>=([\d.]+)", line):
            return tuple(map(int, found[1].split(".")))
    raise AssertionError(f"{package} has no lower bound")


def trees() -> list[ast.Module]:
    folders = (ROOT / "src" / "unmaskrl", ROOT / "benchmarks" / "speed")
    return [
        ast.parse(path.read_text()) for folder in folders for path in sorted(folder.rglob("*.py"))
    ]


def test_names_imported_from_torch_are_in_the_oldest_version_allowed() -> None:
    imported = {
        f"{node.module}.{alias.name}"
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.")
        for alias in node.names
    }
    assert imported == FIRST.keys(), "look up since when torch has the name, and add it"
    assert {name for name in imported if FIRST[name] > lower_bound("torch")} == set()


def test_keywords_are_in_the_oldest_version_allowed() -> None:
    used = {
        (node.func.id, keyword.arg)
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in KEYWORDS
        for keyword in node.keywords
    }
    assert used == {(name, key) for name, keys in KEYWORDS.items() for key in keys}
    assert max(version for keys in KEYWORDS.values() for version in keys.values()) <= lower_bound(
        "torch"
    )


def test_yanked_versions_are_not_the_bound() -> None:
    assert lower_bound("transformers") >= (4, 46, 1), "4.46.0 was withdrawn"
