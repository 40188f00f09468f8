"""Block-causal decoding and scoring on a small random SDAR: token-forwards and seconds.

    python -m benchmarks.blocks --json benchmarks/blocks.json

Cached against whole canvases, a batch of mixed prompts against its rows one by one, exact
likelihoods against decoding calls, and with a clean half per row against one per canvas. Times are
the best of ``--repeat`` in one process; ratios are what is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from unmaskrl.core import estimators, scoring
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.rng import named_generator
from unmaskrl.core.scoring import count_canvases, frozen_token_logps
from unmaskrl.core.types import Canvas, Rollout
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families.sdar import SDAR, SDARConfig

VOCABULARY = 512
BLOCK = 4


def small_sdar(d_model: int, layers: int) -> ModelDenoiser:
    """An SDAR of random weights."""
    config = SDARConfig.from_dict(
        {
            "model_type": "sdar",
            "hidden_size": d_model,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": d_model // 4,
            "intermediate_size": 3 * d_model,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "mask_token_id": VOCABULARY - 3,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": VOCABULARY - 1,
            "block_size": BLOCK,
        }
    )
    model = SDAR(config)
    model.init_weights(named_generator(0, "blocks"))
    return ModelDenoiser.from_model(model)


class Counted(ModelDenoiser):
    """Counts the tokens of its passes."""

    tokens = 0

    def hidden(self, ids: Any, attention_mask: Any = None) -> Any:
        type(self).tokens += ids.numel()
        return super().hidden(ids, attention_mask)

    def hidden_under(self, ids: Any, *rest: Any) -> Any:
        type(self).tokens += ids.numel()
        return super().hidden_under(ids, *rest)


def timed(run: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Seconds of the fastest of ``repeat`` runs, and a result."""
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), result


def decoded(denoiser: ModelDenoiser, canvas: Canvas, cached: bool) -> Rollout:
    return decode(
        denoiser,
        canvas,
        block_length=BLOCK,
        steps=canvas.gen_length,
        select="entropy",
        temperature=1.0,
        stop_at_eos=False,
        generator=named_generator(0, "blocks/decode"),
        cached=cached,
    )


def against_whole(denoiser: ModelDenoiser, canvas: Canvas, repeat: int) -> dict[str, Any]:
    """Cached decoding against passes over whole canvases, as many calls of each.

    In float32 near ties of random weights fall differently, so tokens are compared in float64.
    """
    result: dict[str, Any] = {}
    for name, cached in (("cached", True), ("whole", False)):
        Counted.tokens = 0
        seconds, rollout = timed(lambda c=cached: decoded(denoiser, canvas, c), repeat)
        calls = int(rollout.nfe.sum())
        result[name] = {"seconds": seconds, "tokens": Counted.tokens // repeat, "calls": calls}
    result["fewer_tokens"] = result["whole"]["tokens"] / result["cached"]["tokens"]
    result["faster"] = result["whole"]["seconds"] / result["cached"]["seconds"]
    return result


def measure(gen_length: int, rows: int, d_model: int, layers: int, repeat: int) -> dict[str, Any]:
    """All figures of one size."""
    denoiser = Counted.of(small_sdar(d_model, layers))
    prompts = [list(range(1, 20 + 3 * i)) for i in range(rows)]
    alone = [
        blank_canvas([prompt], gen_length=gen_length, denoiser=denoiser, row_ids=[i])
        for i, prompt in enumerate(prompts)
    ]
    batch = blank_canvas(prompts, gen_length=gen_length, denoiser=denoiser)
    result: dict[str, Any] = {
        "gen_length": gen_length,
        "rows": rows,
        "block_length": BLOCK,
        "one_row": against_whole(denoiser, alone[0], repeat),
        "batch": against_whole(denoiser, batch, 1),
    }
    denoiser.model.double()
    a, b = (decoded(denoiser, alone[0], cached) for cached in (True, False))
    assert a.ids.equal(b.ids), "the cache changed tokens"
    denoiser.model.float()
    one_by_one, _ = timed(lambda: [decoded(denoiser, canvas, True) for canvas in alone], 1)
    together, rollout = timed(lambda: decoded(denoiser, batch, True), repeat)
    result["mixed_prompts"] = {
        "one_by_one": one_by_one,
        "together": together,
        "ratio": one_by_one / together,
    }
    est = estimators.trajectory()
    views = est.make_views(rollout, denoiser.mask_id, named_generator(0, "blocks/views"))
    result["exact_likelihood"] = {
        "passes_per_row": count_canvases(rollout, views) / rows,
        "calls_per_row": float(rollout.nfe.double().mean()),
    }
    for name, copies in (("shared", scoring.MOST_COPIES), ("alone", 1)):
        Counted.tokens = 0
        with mock.patch.object(scoring, "MOST_COPIES", copies):
            seconds, _ = timed(
                lambda: frozen_token_logps(denoiser, rollout, est, views, max_canvases=8), repeat
            )
        result["exact_likelihood"][name] = {"seconds": seconds, "tokens": Counted.tokens // repeat}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args.gen_length, args.rows, args.d_model, args.layers, args.repeat)
    result |= {"torch": torch.__version__, "threads": args.threads, "layers": args.layers}
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
