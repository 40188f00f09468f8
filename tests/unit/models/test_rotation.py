"""Rotary embedding: the plain formula, its gradient, its error in bfloat16, tables of each row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import same_maths, seeded
from unmaskrl.models.families.common import rotary_table, rotate


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([high, low], -1) * sin


def case(dtype: torch.dtype, length: int = 50) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(2, length, 3, 8, generator=seeded(), dtype=torch.float64).to(dtype)
    return x, rotary_table(length, 8, 1e4, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_formula(dtype: torch.dtype) -> None:
    x, rotary = case(dtype)
    weight = torch.randn(x.shape, generator=seeded(1), dtype=dtype)
    ours = x.clone().requires_grad_()
    theirs = x.clone().requires_grad_()
    got = rotate(ours, rotary)
    want = plain(theirs, *rotary)
    assert same_maths(got, want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert same_maths(ours.grad, theirs.grad)


def test_tables_may_differ_by_row() -> None:
    """(B, L, 1, C) tables: row 0 turned by its own positions, row 1 by positions 5 further on."""
    x, _ = case(torch.float64, 20)
    cos, sin = rotary_table(25, 8, 1e4, x)
    tables = tuple(torch.stack([t[:20], t[5:]]) for t in (cos, sin))
    got = rotate(x, (tables[0], tables[1]))
    assert same_maths(got[1:], rotate(x[1:], (cos[5:], sin[5:])))
    assert same_maths(got[:1], rotate(x[:1], (cos[:20], sin[:20])))


def test_bfloat16_loses_little_beside_one_rounding() -> None:
    """Root-mean-square error against float64: below 1.35 of that of rounding the exact result.

    Tables in bfloat16 would give about 1.4, and two roundings of the products 1.2.
    """
    x, rotary = case(torch.bfloat16, 400)
    exact = plain(x.double(), *rotary_table(400, 8, 1e4, x.double()))
    best = (exact.bfloat16().double() - exact).norm()
    got = rotate(x, rotary)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() < 1.35 * best
    wide = tuple(t.bfloat16() for t in rotary)
    assert (plain(x, *wide).double() - exact).norm() > 1.35 * best
