"""GDPO's quadrature of the ELBO over the masking rate (arXiv 2510.08554; NeMo-RL PR #3550).

    L = sum_n (w_n / t_n) * sum_{i in M_n} log p(y_i | M_n masked),   |M_n| = max(1, floor(t_n f))

with Gauss-Legendre nodes t_n and weights w_n on [0, 1] and one uniform subset per node:
``num_nodes`` views (2 or 3 in the paper). The floor is that of NeMo-RL's elbo.py. No variance from
the rate; a bias instead, which for short completions is mostly the rounding in w_n / t_n:
``weight="count"`` uses w_n f / |M_n| and the nearest count (ours; -5.38 becomes unbiased up to
quadrature at f = 5). Exit tokens get their own exact view, as in ``elbo``. Nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import finest_dtype
from ..rng import draw_seed
from ..types import Rollout, Views
from .base import (
    ONLY,
    Estimator,
    Update,
    any_order_candidates,
    any_order_views,
    position_uniform,
    smallest,
    weighted_sum,
)


def gauss(*, num_nodes: int = 3, weight: str = "rate", hide_anchors: bool = False) -> Estimator:
    """The ELBO by Gauss-Legendre quadrature over masking rates. Nats."""
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}")
    if weight not in ("rate", "count"):
        raise ValueError(f"weight must be 'rate' (published) or 'count', got {weight!r}")
    rates, weights = gauss_legendre(num_nodes)

    def make_views(
        rollout: Rollout, mask_id: int, generator: torch.Generator, update: Update = ONLY
    ) -> Views:
        seed = draw_seed(generator)
        candidates = any_order_candidates(rollout, hide_anchors)
        size = candidates.sum(-1)
        draws = []
        for k, (rate, w) in enumerate(zip(rates.tolist(), weights.tolist(), strict=True)):
            count = (
                ((rate * size).round() if weight == "count" else (rate * size).floor())
                .long()
                .clamp(min=1)
            )
            subset = smallest(position_uniform(rollout, seed, k), candidates, count)
            draws.append(
                (
                    subset,
                    w * size / count
                    if weight == "count"
                    else torch.full_like(size, w / rate, dtype=finest_dtype(size.device)),
                )
            )
        return any_order_views(rollout, mask_id, draws)

    return Estimator(
        make_views, weighted_sum, lambda gen_length, nfe, has_exit: num_nodes + has_exit
    )


def gauss_legendre(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], exact for polynomials of degree 2 * num_nodes - 1 (Golub-Welsch:
    eigenvalues of the Jacobi matrix, squared first components of its eigenvectors). fp64.
    """
    k = torch.arange(1, num_nodes, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2
