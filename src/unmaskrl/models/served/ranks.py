"""What one process found out, told to all: a failure of one must end all of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def is_main() -> bool:
    """Whether this process is the one that talks for all."""
    return not _many() or dist.get_rank() == 0


def of_main(value: Any) -> Any:
    """The main process's value. All call."""
    if not _many():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def of_all(value: Any) -> list[Any]:
    """Every process's value, in order. All call."""
    if not _many():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
