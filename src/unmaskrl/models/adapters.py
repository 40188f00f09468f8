"""Low-rank adapters on a model: put on, switched off, merged, saved in peft's layout; and 4-bit
weights by bitsandbytes.

Only linear layers inside the module's ``blocks`` are adapted (LLaDA's output head is called ff_out,
as the last layer of its blocks is: matching names by their end would adapt both).
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..utils.files import json_text, write_whole
from .denoiser import ModelDenoiser
from .families import MaskPredictor
from .low_rank import NAME, LowRankLinear
from .weights import trainable, whole


@dataclass(frozen=True, eq=False, kw_only=True)
class WithoutAdapters(ModelDenoiser):
    """A denoiser with its adapters switched off: the reference policy, at no memory."""

    inner: ModelDenoiser

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The frozen weights alone, and what surrounds a pass of theirs."""
        with adapters_off(self.model), self.inner.passing():
            yield


def add_lora(
    model: MaskPredictor,
    generator: torch.Generator,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
) -> list[str]:
    """Freeze the model and put adapters on its linear layers (float32 at least; A uniform, B zero:
    nothing changes yet).

    ``targets`` None: those that the model's class names, else all; never experts. Returns the
    adapted layers' names. ValueError if a target is no linear layer of a block.
    """
    names = [n for n in linear_names(model) if not any(p in n for p in model.not_adapted)]
    kinds = sorted({name.rpartition(".")[2] for name in names})
    wanted = set(targets or model.adapted or kinds)
    if unknown := wanted - set(kinds):
        raise ValueError(
            f"model.lora.targets: no linear layer is called {sorted(unknown)[0]!r}; the blocks "
            f"have {', '.join(kinds)}"
        )
    chosen = [name for name in names if name.rpartition(".")[2] in wanted]
    first = next(p for p in model.parameters() if p.is_floating_point())
    kept = {"device": first.device, "dtype": torch.promote_types(first.dtype, torch.float32)}
    model.requires_grad_(False)
    for name in chosen:
        layer: Any = model.get_submodule(name)
        bound = layer.in_features**-0.5
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(layer.out_features, rank, **kept)
        parent, _, leaf = name.rpartition(".")
        adapted = LowRankLinear(layer, a.to(**kept), b, alpha / rank)
        setattr(model.get_submodule(parent), leaf, adapted)
    return chosen


def linear_names(model: MaskPredictor) -> list[str]:
    """Linear layers inside the repeated blocks."""
    inside = set(model.blocks.modules())
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m in inside]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Adapted layers by name; none without adapters."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before training; not for gradients."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
@torch.no_grad()
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """The model with W + scale B A in place of W where adapters are on; not for gradients, 4-bit or
    sharded weights.

    The sums are second tensors, as large as the weights: W is not touched, because taking the
    rounded sum apart again would not give it back.
    """
    layers = [layer for _, layer in lora_layers(model)]
    try:
        for layer in layers:
            layer.merged = _with_adapter(layer.base_layer.weight, layer)
        yield
    finally:
        for layer in layers:
            layer.merged = None


@torch.no_grad()
def merged_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """All weights under their published names, adapters added in, shards gathered: every rank must
    call, and may keep none.

    Layer by layer, and what is gathered or merged goes to the CPU: no second model on the device.
    Other tensors are the model's own.
    """
    adapted = dict(lora_layers(model))
    result = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or ".weight." in name:  # adapters; statistics of 4-bit weights
            continue
        published = name.replace(".base_layer.", ".")
        layer, _, leaf = name.rpartition(".")
        value = whole(tensor)
        if leaf == "weight":
            value = _dequantized(model.get_submodule(layer), value)
        if leaf == "weight" and (adapter := adapted.get(published.rpartition(".")[0])) is not None:
            value = _with_adapter(value, adapter)
        if keep:
            result[published] = tensor if value is tensor else value.cpu()
    return result


def save_adapter(
    model: nn.Module,
    folder: Path,
    base: str,
    *,
    rank: int,
    alpha: float,
    revision: str | None = None,
    write: bool = True,
) -> None:
    """The adapters alone in peft's layout, with the name of their base; all ranks call, one
    writes.
    """
    tensors = {
        f"base_model.model.{n.replace(f'.{NAME}.', '.')}": whole(p).detach()
        for n, p in trainable(model).items()
    }
    if not write:
        return
    targets = sorted({name.rpartition(".")[2] for name, _ in lora_layers(model)})
    never = "".join(rf"(?!.*{re.escape(part)})" for part in getattr(model, "not_adapted", ()))
    settings = {
        "peft_type": "LORA",
        # a folder is named whole: the adapter may be loaded from elsewhere
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf"{never}.*\.\d+\..*?({'|'.join(targets)})",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        folder / "adapter_model.safetensors",
        lambda part: save_file(tensors, part, metadata={"format": "pt"}),
    )
    write_whole(
        folder / "adapter_config.json",
        lambda part: part.write_text(json_text(settings, indent=1) + "\n"),
    )


def quantize_blocks(model: MaskPredictor, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Replace the blocks' linear layers by 4-bit NF4 ones (double quantisation) and move the model
    to ``device``.
    """
    bnb = _bitsandbytes()
    for name in linear_names(model):
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=compute_dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to(device))
    model.to(device)


def _with_adapter(weight: Tensor, layer: LowRankLinear) -> Tensor:
    """W + scale B A, added in the adapter's dtype and rounded once."""
    delta = layer.scale * (whole(layer.b) @ whole(layer.a))
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def _dequantized(layer: Any, stored: Tensor) -> Tensor:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return stored
    return _bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)


def _bitsandbytes() -> Any:
    # it warns of kernels we do not use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"bitsandbytes is not installed ({error}): pip install 'unmaskrl[quantize]'"
        ) from None
