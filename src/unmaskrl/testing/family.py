"""``check_family``: what loading, dry runs, adapters and the memory plan ask of a model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..models.denoiser import ModelDenoiser
from ..models.families import Family
from ..models.families.family import ROLES
from .denoiser import check_denoiser
from .require import nothing_drawn, require

_VOCABULARY = (262, 0, 1, 2)  # size, mask, EOS, pad


def check_family(family: Family, config: Mapping[str, Any] | None = None) -> None:
    """AssertionError unless the family reads, writes, shrinks and builds; ``config``: a config.json
    of it (default: the released one).

    A tiny model is drawn and put through ``check_denoiser``.
    """
    raw = dict(config or family.released or {})
    require(bool(raw), "there is no config to check: pass one, or state Family.released")
    read = family.read(raw)
    written = read.to_dict()
    require(
        written.get("model_type") == family.model_type,
        f"to_dict writes model_type {written.get('model_type')!r}, the family is "
        f"{family.model_type!r}: a saved model could not be loaded",
    )
    require(
        family.read(written).to_dict() == written,
        "a config that is written and read again is another one",
    )
    whole = family.build(read)
    require(
        all(p.is_meta for p in whole.parameters()),
        "build takes memory: make the module under torch.device('meta')",
    )
    _check_linears(family, whole.blocks)
    size, mask, eos, pad = _VOCABULARY
    small = read.tiny().with_vocabulary(size, mask, eos, pad)
    got = (small.embedding_size, small.mask_token_id, small.eos_token_id, small.pad_token_id)
    require(
        (got[0] >= size, *got[1:]) == (True, mask, eos, pad),
        f"with_vocabulary{_VOCABULARY} has width, mask, EOS and pad {got}",
    )
    with nothing_drawn("init_weights"):
        first, second = (
            family.build(small).init_weights(torch.Generator().manual_seed(0)) for _ in range(2)
        )
    drawn = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        require(not parameter.is_meta, f"init_weights leaves {name} without memory")
        require(
            torch.equal(parameter, drawn[name]), f"{name} is not drawn from the generator alone"
        )
    check_denoiser(ModelDenoiser.from_model(first.eval()))


def _check_linears(family: Family, blocks: nn.ModuleList) -> None:
    names = {
        name.rpartition(".")[2]
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    }
    if not family.linears:
        return
    unknown = set(family.linears.values()) - set(ROLES)
    require(not unknown, f"linears: {sorted(unknown)} are no roles; roles: {', '.join(ROLES)}")
    require(
        names == set(family.linears),
        f"linears names {sorted(family.linears)}, the blocks have {sorted(names)}",
    )
