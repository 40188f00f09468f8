"""One of two gloo ranks: decodes few or many tokens with a sharded model and says how many
passes it made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.conftest import same_maths, seeded, tiny_llada
from tests.unit.models.block_models import decode_greedily, random_ids, small
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
    report["blocks"] = run_blocks(rank)
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


def run_blocks(rank: int) -> dict[str, object]:
    """Experts and a cache, sharded: other tokens and another number of calls on each rank."""
    denoiser = small("sdar_moe")
    alone = small("sdar_moe")
    shard_blocks(denoiser.model, "fsdp")
    policy = Lockstep.of(denoiser)
    prompt = random_ids(1, 5, rank)[0]
    want = decode_greedily(alone, prompt, 3 + 8 * rank, cached=True)
    got = decode_greedily(policy, prompt, 3 + 8 * rank, cached=True)
    finish_lockstep(policy)
    for ids in (random_ids(1, 2, 0), random_ids(1, 2, 1)):
        alone.hidden(ids).sum().backward()  # few tokens: most experts have none
    denoiser.hidden(random_ids(1, 2, rank)).sum().backward()
    sharded = dict(denoiser.model.blocks.named_parameters())
    same = True
    for name, parameter in alone.model.blocks.named_parameters():
        grad = sharded[name].grad
        assert grad is not None and parameter.grad is not None
        same = same and same_maths(whole(grad), parameter.grad, size=100)
    return {"equal": torch.equal(want[0], got[0]), "gradients": same}


if __name__ == "__main__":
    main(*sys.argv[1:])
