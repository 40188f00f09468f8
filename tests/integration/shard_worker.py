"""One of two gloo ranks: decodes few or many tokens with a sharded model and says how many
passes it made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.conftest import seeded, tiny_llada
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.models.weights import frozen_copy, whole
from unmaskrl.training.ranks.shard import (
    Gathered,
    Lockstep,
    extra_passes,
    finish_lockstep,
    is_split,
    shard_blocks,
)


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report = {mode: run(mode, rank) for mode in ("lockstep", "gathered")}
    Path(out, f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def run(mode: str, rank: int) -> dict[str, object]:
    """A decoding and a backward pass with sharded weights."""
    denoiser = tiny_llada()
    alone = tiny_llada()
    length = 4 if rank else 48  # rank 1 is done after 4 calls, rank 0 after up to 48
    frozen = frozen_copy(denoiser)
    gathered = Gathered(denoiser.model, frozen)
    shard_blocks(denoiser.model, "fsdp")
    if mode == "gathered":
        gathered.refresh()
        policy = frozen
    else:
        policy = Lockstep.of(denoiser)
    canvas = blank_canvas([[1, 2, 3]], gen_length=length, denoiser=alone)
    settings = {"block_length": length, "steps": length, "select": "entropy", "temperature": 1.0}
    passes: list[int] = []
    counting = policy.model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    rollout = decode(policy, canvas, generator=seeded(5), **settings)
    if isinstance(policy, Lockstep):
        finish_lockstep(policy)
    counting.remove()
    expected = decode(alone, canvas, generator=seeded(5), **settings)

    hidden = denoiser.hidden(rollout.ids)  # one pass with gradient here, three there
    hidden.sum().backward()
    if rank:
        denoiser.hidden(rollout.ids).sum().backward()
        denoiser.hidden(rollout.ids).sum().backward()
    extra_passes(denoiser, 3 if rank else 1, 3)
    total = sum(
        float(whole(p.grad).square().sum())
        for p in denoiser.model.parameters()
        if p.grad is not None and is_split(p)
    )
    return {
        "equal": torch.equal(rollout.ids, expected.ids),
        "calls": int(rollout.nfe.max()),
        "passes": len(passes),
        "gradient": total,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
