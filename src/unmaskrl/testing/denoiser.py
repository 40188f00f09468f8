"""``check_denoiser``: what decoding and scoring ask of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.block_causal import block_length_of
from ..core.denoiser import Denoiser, end_ids
from .block_causal import check_block_causal
from .require import close, nothing_drawn, require

_ROWS = 3
_LENGTH = 8
_PADS = 3


def check_denoiser(denoiser: Denoiser) -> None:
    """AssertionError unless ids, shapes, rows, left pads and repeats are what the core relies on.

    Row by row: a canvas alone, in a batch, and behind left pads gives the same hidden states up to
    rounding; the same call twice gives the same bits; a token changes what is said about an earlier
    position (a causal model fails); nothing is drawn from torch's global generator and ids are not
    written to; gradients reach the weights of a denoiser that has any. One that states a
    ``block_length`` sees no later block, and its cache changes nothing. That row l is about
    position l cannot be seen from outside: ``unmaskrl train`` probes a trained model for it.
    """
    _check_ids(denoiser)
    ids = _canvases(denoiser)
    kept = ids.clone()
    with nothing_drawn("the denoiser"), torch.no_grad():
        hidden = denoiser.hidden(ids)
        require(torch.equal(ids, kept), "hidden wrote to the ids it was given")
        require(
            torch.equal(hidden, denoiser.hidden(ids)),
            "the same call gave other hidden states: put the module into eval mode (dropout?)",
        )
        _check_shapes(denoiser, ids, hidden)
        for row in range(_ROWS):
            require(
                close(denoiser.hidden(ids[row : row + 1]), hidden[row : row + 1]),
                f"row {row} alone is not what it is in a batch: rows must be independent",
            )
        _check_pads(denoiser, ids, hidden)
        if block_length_of(denoiser) != 1:  # blocks of one token are causal
            _check_sight(denoiser, ids, hidden)
        if block_length_of(denoiser) is not None:
            check_block_causal(denoiser, ids[ids != denoiser.mask_id].unique())
    model = getattr(denoiser, "model", None)
    if isinstance(model, torch.nn.Module) and any(p.requires_grad for p in model.parameters()):
        require(denoiser.logits(ids).requires_grad, "no gradient reaches the weights")


def _check_ids(denoiser: Denoiser) -> None:
    special = {
        "mask_id": denoiser.mask_id,
        "eos_id": denoiser.eos_id,
        "pad_id": denoiser.pad_id,
        **{f"end_ids[{i}]": token for i, token in enumerate(end_ids(denoiser))},
    }
    for name, token in special.items():
        require(
            0 <= token < denoiser.vocab_size,
            f"{name} {token} is not in 0..{denoiser.vocab_size - 1} (the width of the logits)",
        )
        require(
            name == "mask_id" or token != denoiser.mask_id,
            f"{name} is the mask token {denoiser.mask_id}",
        )


def _canvases(denoiser: Denoiser) -> Tensor:
    """Ordinary tokens, every third open."""
    special = {denoiser.mask_id, denoiser.pad_id, *end_ids(denoiser)}
    ordinary = [token for token in range(denoiser.vocab_size) if token not in special][:500]
    require(len(ordinary) > 1, "there are not two ordinary tokens")
    places = torch.arange(_ROWS * _LENGTH).view(_ROWS, _LENGTH)
    ids = torch.tensor(ordinary)[(places * 7 + 3) % len(ordinary)]
    ids = torch.where(places % 3 == 2, denoiser.mask_id, ids)
    return ids.to(getattr(denoiser, "device", "cpu"))


def _check_shapes(denoiser: Denoiser, ids: Tensor, hidden: Tensor) -> None:
    require(
        hidden.ndim == 3 and hidden.shape[:2] == ids.shape,
        f"hidden of ids {tuple(ids.shape)} is {tuple(hidden.shape)}; expected (B, L, D)",
    )
    logits = denoiser.logits(ids)
    wanted = (*ids.shape, denoiser.vocab_size)
    require(logits.shape == wanted, f"logits are {tuple(logits.shape)}; expected {wanted}")
    require(bool(logits.isfinite().all()), "logits are not finite")
    require(close(denoiser.head(hidden), logits), "logits(ids) is not head(hidden(ids))")
    rows = denoiser.head(hidden[:, 2])
    require(close(rows, logits[:, 2]), "head of some rows is not the logits at those rows")


def _check_pads(denoiser: Denoiser, ids: Tensor, hidden: Tensor) -> None:
    for filler in (denoiser.pad_id, int(ids[0, 0])):
        pads = torch.full((_ROWS, _PADS), filler, device=ids.device)
        seen = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], 1).bool()
        padded = denoiser.hidden(torch.cat([pads, ids], 1), seen)
        require(
            bool(padded.isfinite().all()), "hidden states at or behind left pads are not finite"
        )
        require(
            close(padded[:, _PADS:], hidden),
            f"{_PADS} left pads (attention_mask False, token {filler}) change what stands behind "
            "them",
        )


def _check_sight(denoiser: Denoiser, ids: Tensor, hidden: Tensor) -> None:
    """Some token changes the hidden states of an earlier position."""
    first = ids[:1]
    other = next(int(t) for t in ids.flatten() if int(t) not in (denoiser.mask_id, int(ids[0, 0])))
    changed = []
    for column in range(1, _LENGTH):
        edited = first.clone()
        edited[0, column] = other if int(first[0, column]) != other else int(first[0, 0])
        before = denoiser.hidden(edited)[:, :column]
        changed.append(not close(before, hidden[:1, :column], units=4))
    require(
        any(changed),
        "no token changes what is said about an earlier position: the attention is causal",
    )
