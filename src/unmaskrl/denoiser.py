"""Denoiser: what the core asks of a model. ids (B, L) -> hidden (B, L, D) -> logits at chosen rows.

Row l predicts position l, for every family. A denoiser draws nothing, and its batch rows are independent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .models import FAMILIES

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@runtime_checkable
class Denoiser(Protocol):
    """A mask predictor with its special ids; ``vocab_size`` is the width of the logits."""

    @property
    def mask_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def hidden(self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L D"]:
        """Row l is about position l; keys where ``attention_mask`` is False (left pads) are not attended."""
        ...

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits at chosen rows of ``hidden``."""
        ...

    def logits(self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L V"]:
        """head(hidden(ids)): for short canvases; large vocabularies should pick rows first."""
        ...


@dataclass(frozen=True, eq=False)
class ModelDenoiser:
    """A Denoiser around an nn.Module with ``hidden``, ``head`` and ``config`` (see ``models/``)."""

    model: nn.Module
    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int

    @classmethod
    def from_model(cls, model: nn.Module) -> ModelDenoiser:
        """Take the ids from ``model.config``."""
        config: Any = model.config
        return cls(
            model=model,
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            pad_id=config.pad_token_id,
            vocab_size=config.embedding_size,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """Positions of the model: prompt and completion together."""
        config: Any = self.model.config
        return config.max_sequence_length

    def hidden(self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L D"]:
        """Hidden states after the final norm."""
        model: Any = self.model
        return model.hidden(ids, attention_mask)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits at chosen rows of ``hidden``."""
        model: Any = self.model
        return model.head(hidden)

    def logits(self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L V"]:
        """head(hidden(ids))."""
        return self.head(self.hidden(ids, attention_mask))


def load_denoiser(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ModelDenoiser:
    """Load a checkpoint folder (config.json and safetensors) in eval mode; no network, no remote code.

    ValueError if the path is no folder, the family or a setting is not supported, or the tensors do not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder; download it first with `huggingface-cli download`")
    config = read_json(folder / CONFIG)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{folder / CONFIG} has model_type {family!r}; supported: {', '.join(FAMILIES)}")
    config_class, model_class = FAMILIES[family]
    try:
        model = model_class(config_class.from_dict(config))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = _read_tensors(folder, expected, torch.device(device), dtype)
    model.load_state_dict(tensors, assign=True)
    return ModelDenoiser.from_model(model.eval())


def save_model(model: nn.Module, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors (a tied head once); each file appears whole or not at all.

    ``dtype`` converts the stored weights; None keeps them.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    state = model.state_dict()
    tensors = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in state.items()}
    text = json.dumps(config.to_dict(), indent=1) + "\n"
    write_whole(target / WEIGHTS, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    write_whole(target / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError in one line if it is missing or something else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a checkpoint folder with {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write or download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; expected an object")
    return data


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, sync it and rename it: ``path`` is new and whole, or as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # safetensors makes files that only their owner can read
        with open(part, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; download or save the model again")
    names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} points outside the folder: {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} does not exist, but {INDEX} lists it; download it again")
    return [folder / name for name in names]


def _read_tensors(folder: Path, expected: dict[str, torch.Size], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
                unexpected += [name for name in names if name not in expected]
                for name in names:
                    if name in expected:
                        # A copy: tensors on the mapped file are not aligned, so sums may round differently.
                        tensors[name] = handle.get_tensor(name).to(device, dtype, copy=True)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); download or save it again") from None
    missing = [name for name in expected if name not in tensors]
    wrong = [(name, tensor.shape) for name, tensor in tensors.items() if tensor.shape != expected[name]]
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
