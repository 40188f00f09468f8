"""The finest floating-point numbers that a device has."""

from __future__ import annotations

import torch
from torch import Tensor

# Apple's device has no float64 (torch refuses to make such a tensor on it).
WITHOUT_FLOAT64 = {"mps"}


def finest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def finest(tensor: Tensor) -> Tensor:
    """The tensor in its device's ``finest_dtype``."""
    return tensor.to(finest_dtype(tensor.device))
