"""A pytest plugin that makes this processor round as another one might:
``python -m pytest -p tests.other_processor``.

Sums, products, softmax, exp and log get errors of a few eps of the largest magnitude that was added
up, which depend on the shape of the result and on the place in it. So the same call on the same
tensors stays bit-equal, and another batch shape or another chunk does not. Whatever fails then
compares numbers more exactly than floating point promises (tests/conftest.py says what may be
compared how). Results that need few bits (counts, halves) are exact on every processor and are left
alone. Processes that a test starts round as usual.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

EPS_UNITS = 2.0
FEW_BITS = {torch.float64: 2.0**24, torch.float32: 2.0**8}
NOISE = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
aten = torch.ops.aten


def disturbed(result: Tensor, size: Tensor | None = None) -> Tensor:
    """The result with errors of up to EPS_UNITS * eps * size (its own magnitude if None), where it
    needs many bits.
    """
    if result.dtype not in FEW_BITS or result.numel() == 0:
        return result
    start = sum((i + 1) * n for i, n in enumerate(result.shape)) * 7919
    noise = (
        NOISE[(torch.arange(result.numel()) + start) % len(NOISE)]
        .view(result.shape)
        .to(result.dtype)
    )
    scaled = result * FEW_BITS[result.dtype]
    exact = ~result.isfinite() | (scaled == scaled.round())
    error = EPS_UNITS * torch.finfo(result.dtype).eps * noise * (result if size is None else size)
    return torch.where(exact, result, result + error)


def empty(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype)


def product(operator):
    def run(a: Tensor, b: Tensor) -> Tensor:
        size = operator.out(a.abs(), b.abs(), out=empty(a)) if a.dtype in FEW_BITS else None
        return disturbed(operator.out(a, b, out=empty(a)), size)

    return run


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    result = aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=empty(a))
    if a.dtype not in FEW_BITS:
        return result
    return disturbed(result, aten.addmm.out(bias.abs(), a.abs(), b.abs(), out=empty(a)))


def total(x: Tensor, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.int64)

    def plain(x: Tensor) -> Tensor:
        return aten.sum.IntList_out(x, dim, keepdim, dtype=dtype, out=torch.empty(0, dtype=dtype))

    if not x.is_floating_point():
        return plain(x)
    return disturbed(plain(x), plain(x.abs()))


def softmax(operator):
    def run(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        return disturbed(operator.out(x, dim, half_to_float, out=empty(x)))

    return run


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    result = aten._log_softmax.out(x, dim, half_to_float, out=empty(x))
    return disturbed(result, result.abs() + 1)


def elementwise(operator):
    def run(x: Tensor) -> Tensor:
        result = (
            empty(x) if x.is_floating_point() else torch.empty(0, dtype=torch.get_default_dtype())
        )
        return disturbed(operator.out(x, out=result))

    return run


KERNELS = {
    "mm": product(aten.mm),
    "bmm": product(aten.bmm),
    "addmm": addmm,
    "sum.dim_IntList": total,
    "_softmax": softmax(aten._softmax),
    "_log_softmax": log_softmax,
    "exp": elementwise(aten.exp),
    "log": elementwise(aten.log),
}
LIBRARY = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that kernels are replaced is the purpose
    for name, function in KERNELS.items():
        LIBRARY.impl(name, function, "CPU")
