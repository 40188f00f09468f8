"""What is benchmarked: two model sizes with random weights, random prompts and rollouts, rows that
end early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.denoiser import Denoiser
from unmaskrl.core.losses import token_clip
from unmaskrl.core.rng import named_generator
from unmaskrl.core.types import Canvas, LossOutputs, Rollout, TrainBatch, completion_columns
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import LLaDA, LLaDAConfig, MaskPredictor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model's size, the shapes it is measured at, and the ratios it should reach."""

    d_model: int
    n_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    num_rows: int = 6
    prompt_length: int = 32
    gen_length: int = 64
    block_length: int = 16
    steps: int = 16
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def logits_bytes(self) -> int:
        """fp32 logits of every position of three views per row."""
        return 4 * 3 * self.num_rows * (self.prompt_length + self.gen_length) * self.vocab_size


CASES = {
    "vocab": Case(
        d_model=128,
        n_heads=4,
        n_layers=2,
        mlp_hidden_size=384,
        vocab_size=126464,
        steps=8,
        targets={"greedy rollout": 4.0, "loss memory": 20.0},
    ),
    "proportional": Case(
        d_model=256,
        n_heads=4,
        n_layers=8,
        mlp_hidden_size=768,
        vocab_size=2048,
        targets={"greedy rollout": 1.1},
    ),
}
QUICK = {"num_rows": 2, "prompt_length": 16, "gen_length": 32, "steps": 4, "targets": {}}


def random_denoiser(case: Case, std: float = 0.06) -> ModelDenoiser:
    """Random weights; the mask token's row of the head is 0, so that it is never the likeliest
    token.
    """
    size = case.vocab_size
    config = LLaDAConfig(
        d_model=case.d_model,
        n_heads=case.n_heads,
        n_kv_heads=case.n_heads,
        n_layers=case.n_layers,
        mlp_hidden_size=case.mlp_hidden_size,
        vocab_size=size,
        embedding_size=size,
        mask_token_id=size - 1,
        eos_token_id=size - 2,
        pad_token_id=size - 2,
    )
    model = LLaDA(config).init_weights(named_generator(0, "bench", "weights"), std=std).eval()
    with torch.no_grad():
        vocabulary_weights(model)[-1][config.mask_token_id] = 0.0
    return ModelDenoiser.from_model(model)


def vocabulary_weights(model: MaskPredictor) -> list[nn.Parameter]:
    """What has a row per token: the embedding and, unless it is tied, the output layer."""
    inside = {id(p) for p in model.blocks.parameters()}
    return [p for p in model.parameters() if id(p) not in inside and p.ndim == 2]


def random_canvas(denoiser: Denoiser, case: Case) -> Canvas:
    """Prompts of random ordinary tokens with blank completions."""
    prompts = _random_ids(case, case.prompt_length).tolist()
    return blank_canvas(prompts, gen_length=case.gen_length, denoiser=denoiser)


def random_rollout(denoiser: Denoiser, case: Case) -> Rollout:
    """A finished rollout of random ordinary tokens, to be scored."""
    canvas = random_canvas(denoiser, case)
    ids = _random_ids(case, canvas.ids.shape[1])
    completion = completion_columns(ids, case.gen_length)
    zeros = torch.zeros_like(canvas.row_ids)
    return Rollout(
        ids=ids,
        prompt_mask=canvas.prompt_mask,
        completion_mask=completion,
        attention_mask=canvas.attention_mask,
        decoded_step=completion.long(),
        behavior_logps=torch.zeros(ids.shape),
        nfe=zeros + 1,
        exit_step=zeros,
        row_ids=canvas.row_ids,
        group_ids=zeros,
        gamma=zeros.double(),
        gen_length=case.gen_length,
        temperature=1.0,
        exact=True,
    )


def policy_loss(token_logps: Tensor, rollout: Rollout, old: Tensor, ref: Tensor) -> LossOutputs:
    """GRPO on a group whose first half was right."""
    num_rows = len(rollout.ids)
    mask = rollout.action_mask
    tokens = float(mask.sum())
    batch = TrainBatch(
        action_mask=mask,
        advantages=torch.where(torch.arange(num_rows) < num_rows / 2, 1.0, -1.0),
        old_logps=old,
        ref_logps=ref,
        group_actions=torch.full((num_rows,), tokens),
        num_actions=tokens,
        num_scored=tokens,
        num_rows=float(num_rows),
        num_groups=1.0,
    )
    return token_clip()(token_logps, batch)


def _random_ids(case: Case, length: int) -> Int[Tensor, "B N"]:
    generator = named_generator(0, "bench", "ids")
    return torch.randint(case.vocab_size - 2, (case.num_rows, length), generator=generator)


class EosAfter:
    """A denoiser that ends each row at the completion offset named by the row's first token, and
    not before.

    From there on EOS gets log V on top of its logit: the likeliest token, with a confidence of its
    own at each position.
    """

    def __init__(self, inner: Denoiser, gen_length: int) -> None:
        self.inner, self.gen_length, self.bonus = inner, gen_length, math.log(inner.vocab_size)
        self.mask_id = inner.mask_id
        self.eos_id = inner.eos_id
        self.pad_id = inner.pad_id
        self.vocab_size = inner.vocab_size

    def hidden(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """The inner hidden states and one more column: what is added to the logit of EOS."""
        hidden = self.inner.hidden(ids, attention_mask)
        offset = torch.arange(ids.shape[1]) - (ids.shape[1] - self.gen_length)
        bonus = torch.where(offset >= ids[:, :1], self.bonus, -1e4).to(hidden.dtype)
        return torch.cat([hidden, bonus[..., None]], -1)

    def head(self, hidden: Float[Tensor, "*R D"]) -> Float[Tensor, "*R V"]:
        """Logits with the raised EOS."""
        logits = self.inner.head(hidden[..., :-1])
        logits[..., self.eos_id] += hidden[..., -1]
        return logits

    def logits(
        self, ids: Int[Tensor, "B L"], attention_mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B L V"]:
        """head(hidden(ids))."""
        return self.head(self.hidden(ids, attention_mask))
