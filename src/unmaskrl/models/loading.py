"""Model and tokenizer together: from a checkpoint, or a tiny random stand-in of its family
for a dry run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.precision import finest_dtype
from ..core.threshold_head import ThresholdHead
from ..utils.files import read_json
from ..utils.torch_setup import DTYPES, pick_device
from .adapter_folder import Base, base_of, put_on
from .adapters import quantize_blocks
from .checkpoint import open_folder, stored_dtype
from .denoiser import ModelDenoiser
from .families import (
    Family,
    Given,
    MaskPredictor,
    known_config,
    known_names,
    named_family,
    parse_config,
)
from .heads import load_threshold
from .hub import CONFIG, asset, checkpoint_folder
from .tokenizer import (
    build_byte_tokenizer,
    byte_tokenizer,
    copy_tokenizer,
    decode_texts,
    encode_prompt,
    end_of_turn_ids,
    has_tokenizer,
    load_tokenizer,
    pieces,
)

DECODE_FILE = "decode.json"


@dataclass(frozen=True, repr=False)
class Model:
    """A checkpoint, ready to be decoded, evaluated or trained on.

    ``decode_settings``: by task, as stored beside the weights (decode.json). ``head``: the learned
    sampler's threshold head, if there is one. ``folder``: where config.json lies.
    """

    denoiser: ModelDenoiser
    tokenizer: Any
    decode_settings: dict[str, dict[str, Any]]
    head: ThresholdHead | None
    folder: Path

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Chat messages as the ids of a prompt."""
        return encode_prompt(self.tokenizer, messages)

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Texts of completions."""
        return decode_texts(self.tokenizer, completions)

    def __repr__(self) -> str:
        module = self.denoiser.model
        first = next(module.parameters())
        count = sum(p.numel() for p in module.parameters())
        dtype = str(first.dtype).removeprefix("torch.")
        text = f"{type(module).__name__}, {count / 1e6:.2f}M parameters, {dtype} on {first.device}"
        if self.decode_settings:
            text += f", decode settings for {', '.join(self.decode_settings)}"
        return f"Model({text}{', threshold head' if self.head else ''})"


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    family: str | Family | None = None,
    quantize: str | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    block_length: int | None = None,
) -> Model:
    """Model, tokenizer, decode settings and threshold head of a shipped name, a folder, a run's
    folder (its final model) or a hub id.

    ``device``: auto (a GPU if there is one), cpu, cuda, mps. ``dtype``: float32, bfloat16, float64
    or auto (what the checkpoint has). ``family``: what reads it, if it is none of the shipped ones
    (``module:factory``). ``quantize="nf4"``: 4-bit blocks (bitsandbytes). ``mask_id``, ``eos_id``,
    ``block_length``: in place of what config.json says, or does not say. ValueError in one line if
    it cannot be loaded.
    """
    if isinstance(dtype, str) and dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype: expected {', '.join(DTYPES)} or auto, got {dtype!r}")
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize: expected nf4 or nothing, got {quantize!r}")
    place = pick_device(device)
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted == torch.float64 and finest_dtype(place) != torch.float64:
        raise ValueError(f"dtype: {place.type} has no float64; use float32 or bfloat16")
    given = Given(mask_id=mask_id, eos_id=eos_id, block_length=block_length)
    own = named_family(family, "family")
    denoiser, tokenizer, folder = open_checkpoint(
        path, "cpu" if quantize else place, wanted, revision, own, given
    )
    if quantize:
        quantize_blocks(denoiser.model, place, next(denoiser.model.parameters()).dtype)
    return Model(
        denoiser, tokenizer, stored_settings(folder), load_threshold(folder, place), folder
    )


def stored_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The decode settings beside the weights, by task; empty without any. ValueError for something
    else.
    """
    file = folder / DECODE_FILE
    stored = read_json(file) if file.is_file() else {}
    if not all(isinstance(settings, dict) for settings in stored.values()):
        raise ValueError(
            f"{file}: expected an object of decode settings for each task; correct or delete it"
        )
    return stored


def open_checkpoint(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    family: Family | None = None,
    given: Given | None = None,
) -> tuple[ModelDenoiser, Any, Path]:
    """Denoiser, tokenizer and folder of a checkpoint: a shipped name, a folder (a run's too) or a
    hub id.

    ``dtype`` None: what the checkpoint has. ``family`` None: found by config.json's model_type.
    ``given``: in place of what config.json says. An adapter is put on the base that it names, and
    the tokenizer is the base's.
    """
    folder = checkpoint_folder(asset(str(path)), revision)
    base = base_of(folder)
    if base is not None:
        return _open_adapter(folder, base, device, dtype, family, given)
    # the family first: what else is wrong depends on it
    name = str(path)
    config, _ = parse_config(read_json(folder / CONFIG), folder / CONFIG, family, given, name)
    tokenizer = load_tokenizer(folder, family=family, config=config)
    denoiser = open_folder(folder, device, dtype or stored_dtype(folder), family, given, name)
    return with_end_ids(denoiser, tokenizer), tokenizer, folder


def _open_adapter(
    folder: Path,
    base: Base,
    device: str | torch.device,
    dtype: torch.dtype | None,
    family: Family | None,
    given: Given | None,
) -> tuple[ModelDenoiser, Any, Path]:
    try:
        denoiser, tokenizer, base_folder = open_checkpoint(
            base.path, device, dtype, base.revision, family, given
        )
    except ValueError as error:
        raise ValueError(
            f"{folder} is an adapter of {base.path}, which cannot be loaded: {error}"
        ) from None
    put_on(denoiser.model, folder)
    return denoiser, tokenizer, folder if has_tokenizer(folder) else base_folder


def with_end_ids(denoiser: ModelDenoiser, tokenizer: Any) -> ModelDenoiser:
    """The denoiser whose completions also end at the token that the chat template writes after an
    answer, and that knows how its ids read.
    """
    return replace(
        denoiser,
        end_ids=(denoiser.eos_id, *end_of_turn_ids(tokenizer)),
        pieces=partial(pieces, tokenizer),
    )


def stand_in_folder(path: str) -> Path | None:
    """The local folder whose tokenizer a random stand-in uses; None: it has none, or only the
    model's name is known.
    """
    return Path(path) if Path(path).is_dir() and has_tokenizer(Path(path)) else None


def random_tiny(
    path_or_family: str,
    generator: torch.Generator,
    family: Family | None = None,
    given: Given | None = None,
) -> MaskPredictor:
    """A random model with 2 layers of width 64 and every other setting of the config.json in a
    folder; downloads nothing.

    Without a folder, the family is known from a released model's hub id, or given as its
    model_type. The vocabulary is the model's own if its tokenizer is there too, else the byte
    tokenizer's.
    """
    folder = Path(path_or_family)
    local = folder.is_dir()
    raw = read_json(folder / CONFIG) if local else known_config(path_or_family, family)
    if raw is None:
        known = ", ".join(f"{start}*" for start in known_names(family))
        raise ValueError(
            f"random_init=tiny: {path_or_family} is neither a folder with a {CONFIG} nor a model "
            f"known by name ({known})"
        )
    where = folder / CONFIG if local else path_or_family
    config, family = parse_config(raw, where, family, given, path_or_family)
    config = config.tiny()
    if stand_in_folder(path_or_family) is None:
        t = byte_tokenizer()
        config = config.with_vocabulary(len(t), t.mask_token_id, t.eos_token_id, t.pad_token_id)
    return family.build(config).init_weights(generator).eval()


def write_tokenizer(folder: Path | None, target: Path) -> None:
    """Put a model's tokenizer into ``target``: the files of ``folder``, or the byte tokenizer."""
    if folder is None:
        build_byte_tokenizer(target)
    else:
        copy_tokenizer(folder, target)
