"""A rollout engine as a user would write it, in a file outside the package: left to right, one
token per call, without ``decode``.
"""

from __future__ import annotations

import torch

import unmaskrl as u


class LeftToRight:
    features = frozenset({"step_maps", "behavior_logps", "anchors"})
    rules = frozenset({"left_to_right"})

    def __init__(self, denoiser: u.Denoiser, *, greeting: str = "") -> None:
        self.denoiser = denoiser
        self.greeting = greeting
        self.syncs = 0

    def sync(self) -> None:
        self.syncs += 1

    @torch.no_grad()
    def sample(self, canvas, settings, generator=None, gamma=None):
        if settings.exit_at is not None or settings.steps != canvas.gen_length:
            raise ValueError("left to right, one token per call: set steps=gen_length, no exit_at")
        den = self.denoiser
        ids = canvas.ids.clone()
        steps = torch.zeros_like(ids)
        logps = torch.zeros(ids.shape)
        calls = torch.zeros_like(canvas.row_ids)
        for column in range(ids.shape[1] - canvas.gen_length, ids.shape[1]):
            rows = (ids[:, column] == den.mask_id).nonzero().squeeze(-1)
            if not len(rows):
                continue
            hidden = den.hidden(ids[rows], canvas.attention_mask[rows])[:, column]
            logits = den.head(hidden).float()
            logits[:, den.mask_id] = -torch.inf
            law = (logits / (settings.temperature or 1.0)).log_softmax(-1)
            if settings.temperature:
                tokens = torch.multinomial(law.exp(), 1, generator=generator).squeeze(-1)
            else:
                tokens = law.argmax(-1)
            ids[rows, column] = tokens
            calls[rows] += 1
            steps[rows, column] = calls[rows]
            logps[rows, column] = law[torch.arange(len(rows)), tokens].clamp(max=0)
        return u.Rollout(
            ids=ids,
            prompt_mask=canvas.prompt_mask,
            completion_mask=ends(ids, canvas.gen_length, den),
            attention_mask=canvas.attention_mask,
            decoded_step=steps,
            behavior_logps=logps,
            nfe=calls,
            exit_step=torch.zeros_like(calls),
            row_ids=canvas.row_ids,
            group_ids=canvas.group_ids,
            gamma=torch.zeros(len(ids), dtype=torch.float64),
            gen_length=canvas.gen_length,
            temperature=settings.temperature,
            exact=True,
        )


def ends(ids, gen_length, den):
    """True up to and including the first token that ends a completion."""
    completion = torch.arange(ids.shape[1]) >= ids.shape[1] - gen_length
    stops = getattr(den, "end_ids", ()) or (den.eos_id,)
    end = torch.isin(ids, torch.tensor(stops)) & completion
    return completion & (end.long().cumsum(-1) - end.long() == 0)


def not_an_engine(denoiser):
    return denoiser
