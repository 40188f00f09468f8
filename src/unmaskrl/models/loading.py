"""Model and tokenizer together (shell): from a checkpoint, or a tiny random stand-in of its family
for a dry run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..utils.files import read_json
from .adapter_folder import Base, base_of, put_on
from .checkpoint import load_denoiser
from .denoiser import ModelDenoiser
from .families import Family, MaskPredictor, known_config, known_names, parse_config
from .hub import CONFIG, asset, checkpoint_folder
from .tokenizer import (
    build_byte_tokenizer,
    byte_tokenizer,
    copy_tokenizer,
    end_of_turn_ids,
    has_tokenizer,
    load_tokenizer,
)


def open_checkpoint(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    family: Family | None = None,
) -> tuple[ModelDenoiser, Any, Path]:
    """Denoiser, tokenizer and folder of a checkpoint: a shipped name, a folder (a run's too) or a
    hub id.

    ``family`` None: found by config.json's model_type. An adapter is put on the base that it names,
    and the tokenizer is the base's.
    """
    folder = checkpoint_folder(asset(str(path)), revision)
    base = base_of(folder)
    if base is not None:
        return _open_adapter(folder, base, device, dtype, family)
    # the family first: what else is wrong depends on it
    parse_config(read_json(folder / CONFIG), folder / CONFIG, family)
    tokenizer = load_tokenizer(folder, family=family)
    denoiser = load_denoiser(folder, device, dtype, family=family)
    return with_end_ids(denoiser, tokenizer), tokenizer, folder


def _open_adapter(
    folder: Path,
    base: Base,
    device: str | torch.device,
    dtype: torch.dtype,
    family: Family | None,
) -> tuple[ModelDenoiser, Any, Path]:
    try:
        denoiser, tokenizer, base_folder = open_checkpoint(
            base.path, device, dtype, base.revision, family
        )
    except ValueError as error:
        raise ValueError(
            f"{folder} is an adapter of {base.path}, which cannot be loaded: {error}"
        ) from None
    put_on(denoiser.model, folder)
    return denoiser, tokenizer, folder if has_tokenizer(folder) else base_folder


def with_end_ids(denoiser: ModelDenoiser, tokenizer: Any) -> ModelDenoiser:
    """The denoiser whose completions also end at the token that the chat template writes after an
    answer.
    """
    return replace(denoiser, end_ids=(denoiser.eos_id, *end_of_turn_ids(tokenizer)))


def stand_in_folder(path: str) -> Path | None:
    """The local folder whose tokenizer a random stand-in uses; None: it has none, or only the
    model's name is known.
    """
    return Path(path) if Path(path).is_dir() and has_tokenizer(Path(path)) else None


def random_tiny(
    path_or_family: str, generator: torch.Generator, family: Family | None = None
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
    config, family = parse_config(raw, folder / CONFIG if local else path_or_family, family)
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
