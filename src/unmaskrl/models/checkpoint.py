"""A model's folder: config.json and safetensors, read without a second copy and written whole."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.finite import NotFiniteError, first_not_finite
from ..utils.files import json_text, read_json, write_whole
from .denoiser import ModelDenoiser
from .families import Family, Given, named_family, parse_config
from .hub import ADAPTER, CONFIG, checkpoint_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_STORED = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def load_denoiser(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    family: str | Family | None = None,
    *,
    mask_id: int | None = None,
    eos_id: int | None = None,
    block_length: int | None = None,
) -> ModelDenoiser:
    """Load a checkpoint (config.json and safetensors) in eval mode: a folder, or a hub id at
    ``revision``; no remote code.

    ``family``: the one that reads it, if it is none of the shipped ones (``module:factory``).
    ``mask_id``, ``eos_id``, ``block_length``: in place of what config.json says, or does not say;
    a saved model has them in its own. Tensors are read one by one into ``dtype`` on ``device``:
    there are never two copies. ValueError if there is no such checkpoint, the family or a setting
    is not supported, or the tensors do not fit.
    """
    folder = checkpoint_folder(path, revision)
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} is an adapter: unmaskrl.models.loading.open_checkpoint puts it on its base"
        )
    given = Given(mask_id=mask_id, eos_id=eos_id, block_length=block_length)
    return open_folder(folder, device, dtype, named_family(family, "family"), given, str(path))


def open_folder(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    family: Family | None,
    given: Given | None,
    name: str,
) -> ModelDenoiser:
    """``load_denoiser`` of a folder, whose model was called ``name``."""
    where = folder / CONFIG
    config, own = parse_config(read_json(where), where, family, given, name)
    model = own.build(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    dtypes = _dtypes(expected, dtype, model.exact)
    tensors = _read_tensors(folder, expected, torch.device(device), dtypes, own.derived)
    model.load_state_dict(tensors, assign=True)
    return ModelDenoiser.from_model(model.eval())


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and safetensors (a tied head once); each file appears whole or not at all.

    ``dtype`` converts the stored weights, None keeps them; ``tensors`` (published names) stand in
    for the model's own. A model of more than ``max_shard_bytes`` is written in shards with an
    index, as the hub's checkpoints are; weight files of an earlier save are removed when the new
    ones are there. NotFiniteError if a weight is NaN or infinite: nothing is written.
    """
    target = Path(folder)
    config: Any = model.config
    state = model.state_dict() if tensors is None else tensors
    _refuse_not_finite(target, state)
    target.mkdir(parents=True, exist_ok=True)
    own = _dtypes(state, dtype, getattr(model, "exact", ()))
    sizes = {name: t.numel() * own[name].itemsize for name, t in state.items()}
    shards = _shards(sizes, max_shard_bytes)
    for file, names in shards.items():
        part_of = {name: state[name].detach().to("cpu", own[name]).contiguous() for name in names}
        _refuse_not_finite(target, part_of if dtype else {})  # float16 ends at 65,504
        write_whole(
            target / file,
            lambda part, part_of=part_of: save_file(part_of, part, metadata={"format": "pt"}),
        )
    keep = {*shards}
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_whole(
            target / INDEX,
            lambda part: part.write_text(json_text(index, indent=2) + "\n", encoding="utf-8"),
        )
        keep.add(INDEX)
    text = json_text(config.to_dict(), indent=1) + "\n"
    write_whole(target / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))
    for old in (target / WEIGHTS, target / INDEX, *target.glob(SHARDS)):
        if old.name not in keep:
            old.unlink(missing_ok=True)


def _dtypes(
    tensors: Mapping[str, Any], dtype: torch.dtype | None, exact: tuple[str, ...]
) -> dict[str, torch.dtype]:
    """What each tensor is converted to (None: kept); those of the ``exact`` endings are float32 at
    least.
    """
    wide = {name: dtype or t.dtype for name, t in tensors.items()}
    return {
        name: torch.promote_types(to, torch.float32) if name.endswith(exact) else to
        for name, to in wide.items()
    }


def _refuse_not_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    name = first_not_finite(tensors)
    if name is not None:
        raise NotFiniteError(
            f"{folder}: not written, {name} is not finite (as {tensors[name].dtype}): save a whole "
            "model"
        )


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file at most ``limit`` bytes (a larger tensor has
    one of its own).
    """
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, 1)
    }


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; download or save the model again"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(
            f"{folder / INDEX} has no weight_map of tensor names to files; download it again"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} points outside the folder: {name!r}")
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} does not exist, but {INDEX} lists it; download it again"
            )
    return [folder / name for name in names]


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of number that most of a checkpoint's values are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as handle:
            for name in list(handle.keys()):
                part = handle.get_slice(name)
                if part.get_dtype() in _STORED:
                    counts[_STORED[part.get_dtype()]] += math.prod(part.get_shape())
    if not counts:
        raise ValueError(
            f"{folder} stores no {', '.join(_STORED)} tensor; name a dtype, for instance float32"
        )
    return counts.most_common(1)[0][0]


def _read_tensors(
    folder: Path,
    expected: dict[str, torch.Size],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    derived: tuple[str, ...],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
                unexpected += [
                    name for name in names if name not in expected and not name.endswith(derived)
                ]
                for name in names:
                    if name in expected:
                        # A copy: tensors on the mapped file are not aligned, so sums may round
                        # differently.
                        tensors[name] = handle.get_tensor(name).to(device, dtypes[name], copy=True)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); download or save it again") from None
    missing = [name for name in expected if name not in tensors]
    wrong = [
        (name, tensor.shape) for name, tensor in tensors.items() if tensor.shape != expected[name]
    ]
    shapes = [f"{name} {tuple(shape)} (expected {tuple(expected[name])})" for name, shape in wrong]
    for problem, names in (
        ("lacks tensors", missing),
        ("has unexpected tensors", unexpected),
        ("has wrong shapes:", shapes),
    ):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{folder} {problem} {some}; the weights do not fit {CONFIG}")
    return tensors
