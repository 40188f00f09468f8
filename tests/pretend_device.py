"""A pretend accelerator: tensors that call themselves ``meta`` and hold their numbers on the CPU.

As on a GPU, an operation on such a tensor and a CPU tensor (but for numbers and index tensors) is
refused, and so is a CPU generator: code that forgets a ``.to(device)`` fails here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_aten: Any = torch.ops.aten
_BETWEEN = {_aten.copy_.default, _aten._to_copy.default}
_INDEX = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_TENSOR = torch.tensor


class Far(Tensor):
    """A tensor on the pretend device."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return make(cls, near.shape, strides=near.stride(), dtype=near.dtype, device=DEVICE)

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Inside, tensors that are made on or moved to the yielded device are ``Far``."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    # Module.to must not set .data of a Far
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        # on the real meta device, nn.Linear's own initialisation draws nothing
        with torch.random.fork_rng(devices=[]), _Operations(), _Factories():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """torch.tensor(..., device=...) does not dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is _TENSOR and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
    far = any(isinstance(t, Far) for t in tensors)
    near = [tuple(t.shape) for t in tensors if not isinstance(t, Far) and t.ndim]
    if far and near and func not in _BETWEEN and not (func in _INDEX and isinstance(args[0], Far)):
        raise RuntimeError(f"{func}: CPU tensors of shapes {near} meet tensors on the device")
    result_far = isinstance(args[0], Far) if func is _aten.copy_.default else far
    if kwargs.get("device") is not None:
        result_far = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if result_far and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a CPU generator for a tensor on the device")
    inner_args, inner_kwargs = tree_map(
        lambda a: a.near if isinstance(a, Far) else a, (args, kwargs)
    )
    result = func(*inner_args, **inner_kwargs)
    if not result_far or func is _aten._local_scalar_dense.default:
        return result
    wrapped = tree_map(lambda a: Far(a) if isinstance(a, Tensor) else a, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)
