"""Keys and values of a block-causal model, kept between calls; the caller says which column is
whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayerCache(NamedTuple):
    """Keys and values of one layer, and where a pass writes its own: ``rows`` (B, 1) and
    ``columns`` (B, T).
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor

    def put(
        self, k: Float[Tensor, "B T K C"], v: Float[Tensor, "B T K C"], seen: int
    ) -> tuple[Float[Tensor, "B K S C"], Float[Tensor, "B K S C"]]:
        """Write keys and values; returns those of the first ``seen`` columns."""
        self.keys[self.rows, :, self.columns] = k
        self.values[self.rows, :, self.columns] = v
        return self.keys[:, :, :seen], self.values[:, :, :seen]


@dataclass(slots=True)
class Cache:
    """Per layer: rotated keys, and values, (rows, kv_heads, columns, head_dim).

    A column that was never written holds zeros: under a mask uninitialised memory could be NaN,
    and 0 * NaN is NaN.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        heads: int,
        columns: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Cache:
        """A cache of zeros."""
        shape = (rows, heads, columns, head_dim)
        keys, values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
            for _ in range(2)
        )
        return cls(keys, values)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.keys[0].shape[0]

    @property
    def columns(self) -> int:
        """Columns of each row."""
        return self.keys[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def keep(self, index: Int[Tensor, " K"]) -> None:
        """Go on with these rows, in this order; the memory of the others is freed, layer by
        layer.
        """
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.index_select(0, index)

    def layers(self, columns: Int[Tensor, "B T"]) -> list[LayerCache]:
        """Every layer's part, to be written at ``columns``."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        both = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, rows, columns) for keys, values in both]
