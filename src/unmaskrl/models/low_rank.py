"""A linear layer with a low-rank adapter: y = W x + scale B (A x), with W frozen.

A and B are kept in float32 at least and cast to the dtype of x for each pass: they are small, and
a product in float32 runs at about a fifteenth of a GPU's rate. Gradients come back through the cast
and add up in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NAME = "default"  # peft's name of a model's only adapter


class LowRankLinear(nn.Module):
    """A linear layer (of any kind, 4-bit too) and its adapter.

    Parameters are called as peft calls them: ``base_layer.weight``, ``lora_A.default.weight``
    (rank, inputs) and ``lora_B.default.weight`` (outputs, rank).
    """

    def __init__(self, base_layer: Any, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({NAME: _factor(a)})
        self.lora_B = nn.ModuleDict({NAME: _factor(b)})
        self.rank = len(a)
        self.scale = scale
        self.enabled = True
        self.merged: Tensor | None = (
            None  # W + scale B A, while passes use it (``adapters_merged``)
        )

    @property
    def a(self) -> Any:
        """A, as it is kept."""
        return self.lora_A[NAME].weight

    @property
    def b(self) -> Any:
        """B, as it is kept."""
        return self.lora_B[NAME].weight

    @property
    def is_apart(self) -> bool:
        """Whether passes multiply by A and B: the adapter is on, and not merged."""
        return self.enabled and self.merged is None

    def forward(
        self, x: Float[Tensor, "... N"], low: Float[Tensor, "T R"] | None = None
    ) -> Float[Tensor, "... M"]:
        """W x + scale B (A x); ``low`` is A x of all T tokens, where others computed it too."""
        if self.enabled and self.merged is not None:
            return F.linear(x, self.merged, self.base_layer.bias)
        out = self.base_layer(x)
        if not self.enabled:
            return out
        if low is None:
            low = F.linear(x.flatten(0, -2), self.a.to(x.dtype))
        # scaled in float32, in the kernel that casts it where blocks are compiled
        return out + F.linear(low, (self.scale * self.b).to(x.dtype)).view(out.shape)


def linears(x: Float[Tensor, "... N"], *layers: nn.Module) -> Iterator[Tensor]:
    """The outputs of linear layers that read the same x; A x of their adapters is one product.

    One by one: an output can be let go before the next is made.
    """
    adapted = [one for one in layers if isinstance(one, LowRankLinear) and one.is_apart]
    parts: dict[nn.Module, Tensor] = {}
    if len(adapted) > 1:
        # of two dimensions: a part of the columns is then still one product's operand
        low = F.linear(x.flatten(0, -2), torch.cat([one.a for one in adapted]).to(x.dtype))
        parts = dict(zip(adapted, low.split([one.rank for one in adapted], -1), strict=True))
    for layer in layers:
        yield layer(x, parts[layer]) if layer in parts else layer(x)


def _factor(weight: Tensor) -> nn.Linear:
    # on the meta device: a new layer would draw from the global generator
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer
