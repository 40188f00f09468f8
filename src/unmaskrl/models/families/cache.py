"""Keys and values of a block-causal model, kept between calls; the caller says which column is
whose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    def put(
        self,
        layer: int,
        columns: Int[Tensor, "B T"],
        seen: int,
        k: Float[Tensor, "B T K C"],
        v: Float[Tensor, "B T K C"],
    ) -> tuple[Float[Tensor, "B K S C"], Float[Tensor, "B K S C"]]:
        """Write keys and values at ``columns``; returns those of the first ``seen`` columns."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        keys = self.keys[layer]
        values = self.values[layer]
        keys[rows, :, columns] = k
        values[rows, :, columns] = v
        return keys[:, :, :seen], values[:, :, :seen]
