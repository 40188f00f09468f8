"""Sizes of a model that memory depends on, measured on its family's module without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.families import Family, FamilyConfig, MaskPredictor
from .cost import count_parameters, empty_module

# What a block's linear layers read, by their role (``families.family.ROLES``): x1 and x2 are the
# outputs of the two norms.
READS = {
    "q": "x1",
    "k": "x1",
    "v": "x1",
    "qkv": "x1",  # in place of the three
    "out": "attention",
    "gate": "x2",
    "up": "x2",
    "down": "product",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes that memory depends on; ``vocab`` is the width of the logits."""

    d_model: int
    n_layers: int
    n_heads: int
    heads: int  # width of the queries
    kv: int  # width of the keys, and of the values
    mlp: int  # inner values of one token in a block's MLP, or in all of its experts together
    experts: int  # that a token goes to; 0: there are none
    vocab: int
    parameters: int
    tied: bool
    linears: tuple[tuple[str, str], ...]  # name and role of a block's linear layers
    sizes: tuple[tuple[str, tuple[int, int]], ...]  # inputs and outputs by role, the largest
    adapted: tuple[tuple[str, int], ...]  # inputs + outputs by role, of layers that may be adapted
    below: tuple[tuple[str, int], ...]  # weights of those layers, by role
    targets: tuple[str, ...]  # names that are adapted if a recipe names none
    in_linears: int  # weights of the blocks' linear layers
    largest: int  # weights of the largest of them
    block_length: int | None

    @classmethod
    def of(cls, config: FamilyConfig, family: Family) -> ModelShape:
        """Measured; ValueError if not all linear layers have a role."""
        known = set(family.linears.values())
        needed = READS.keys() - ({"q", "k", "v"} if "qkv" in known else {"qkv"})
        if missing := needed - known:
            raise ValueError(
                f"family {family.model_type}: linears names no layer for {sorted(missing)[0]!r}; "
                f"a memory plan needs {', '.join(needed)}"
            )
        module = empty_module(config, family)
        layers = _linears(module, family)
        sizes: dict[str, tuple[int, int]] = {}
        adapted: dict[str, int] = {}
        below: dict[str, int] = {}
        for name, role, size in layers:
            sizes[role] = max(sizes.get(role, (0, 0)), size)
            if not any(part in name for part in module.not_adapted):
                adapted[role] = adapted.get(role, 0) + sum(size)
                below[role] = below.get(role, 0) + size[0] * size[1]
        heads = sizes["out"][0]
        # of the product of all three, what is not queries is keys and values
        kv = sizes["k"][1] if "k" in sizes else (sizes["qkv"][1] - heads) // 2
        inside = {id(p) for p in module.blocks.parameters()}
        outer = [p for p in module.parameters() if id(p) not in inside and p.ndim == 2]
        return cls(
            d_model=config.d_model,
            n_layers=len(module.blocks),
            n_heads=config.n_heads,
            heads=heads,
            kv=kv,
            mlp=module.inner_size or sizes["down"][0],
            experts=module.experts_per_token,
            vocab=config.embedding_size,
            parameters=count_parameters(module),
            tied=len(outer) == 1,
            linears=tuple(family.linears.items()),
            sizes=tuple(sizes.items()),
            adapted=tuple(adapted.items()),
            below=tuple(below.items()),
            targets=module.adapted or tuple(family.linears),
            in_linears=sum(a * b for _, _, (a, b) in layers),
            largest=max(a * b for a, b in sizes.values()),
            block_length=module.block_length,
        )

    def linear(self, role: str) -> tuple[int, int]:
        """Inputs and outputs of the largest linear layer with this role."""
        return dict(self.sizes)[role]

    def adapter_parameters(self, rank: int, roles: tuple[str, ...]) -> int:
        """rank * (inputs + outputs), summed over the adapted layers."""
        adapted = dict(self.adapted)
        return rank * sum(adapted[role] for role in roles)

    def adapted_weights(self, roles: tuple[str, ...]) -> int:
        """Weights of the layers that adapters of these roles sit on."""
        return sum(dict(self.below)[role] for role in roles)

    def cache_bytes(self, rows: int, columns: int, dtype: int) -> int:
        """Keys and values of all layers."""
        return 2 * self.n_layers * rows * columns * self.kv * dtype


def _linears(module: MaskPredictor, family: Family) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, role and size of every linear layer of the blocks."""
    layers: list[tuple[str, Any]] = [
        (name, layer)
        for name, layer in module.blocks.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    return [
        (f".{name}", family.linears[name.rpartition(".")[2]], (one.in_features, one.out_features))
        for name, one in layers
    ]


def adapted_layers(targets: tuple[str, ...] | None, shape: ModelShape) -> tuple[str, ...]:
    """The roles of ``model.lora.targets``; null: the model's own."""
    known = dict(shape.linears)
    unknown = [name for name in targets or () if name not in known]
    if unknown:
        raise ValueError(
            f"model.lora.targets: {unknown[0]!r} is no linear layer of a block; known: "
            f"{', '.join(known)}"
        )
    roles = dict.fromkeys(known[name] for name in targets or shape.targets)
    return tuple(role for role in roles if role in dict(shape.adapted))
