"""What one GPU makes of a run, in at most five minutes and without a download.

    python -m benchmarks.gpu --out gpu              # LLaDA-8B and Dream-7B: 80 GB
    python -m benchmarks.gpu --small --out gpu      # four of their layers: any GPU
    python -m benchmarks.gpu --cpu --out gpu        # tries the script: tiny models, figures mean
                                                    # nothing

Writes OUT.json, and OUT.md with a table. Weights are random, of the released shapes, made on the
device.
``share`` is needed FLOPs / time / the rate of a large matrix product measured in the same run;
``ratio`` the published loop's time over ours, in the same run. That loop is
``benchmarks.speed.bench.naive_decode`` on our module as written; the published module is slower. A
rollout here decodes the last block of a completion, so that its calls are those of any block.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import unmaskrl as u
from benchmarks.gpu_tools import (
    GIB,
    SIZES,
    Bench,
    Row,
    Subject,
    WideFloats,
    machine_of,
    markdown,
    synchronisations,
)
from benchmarks.speed.bench import naive_decode
from unmaskrl.core import estimators
from unmaskrl.core.decoding import decode
from unmaskrl.core.scoring import backward_in_chunks, frozen_token_logps
from unmaskrl.core.types import Canvas, LossOutputs, Rollout
from unmaskrl.models.adapters import add_lora
from unmaskrl.models.compiled import compile_blocks, no_compiler
from unmaskrl.models.tokenizer import byte_tokenizer
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.memory import Setup, memory_plan, on_device
from unmaskrl.training import setup
from unmaskrl.training.memory_notes import this_machine

RECIPE = "llada-8b-countdown-stp"
ESTIMATOR = estimators.elbo(num_mc=3)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "T .9": {"temperature": 0.9},
    # random weights are unsure of every token: about eight of them in a call
    "eb": {"select": "eb", "gamma": 80.0, "temperature": 0.9},
    "exit": {"temperature": 0.9, "exit_at": 0.7},
}


def ceilings(bench: Bench) -> None:
    """The rates that everything else is measured by."""
    n = bench.size.square
    a, b = (torch.ones(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    seconds = bench.seconds(lambda: a @ b, 10)
    bench.rate = 2 * n**3 / seconds
    bench.add("ceilings", f"product {n}^3", seconds, tflops=bench.rate / 1e12)
    source = torch.ones(bench.size.copied, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source), 10)
    bench.add("ceilings", "copy", seconds, tb_per_s=2 * source.numel() / seconds / 1e12)


@torch.no_grad()
def body(bench: Bench, subject: Subject, kind: str) -> None:
    """One pass without head."""
    for rows in bench.size.batches:
        ids = subject.canvas(bench, rows).ids
        seconds = bench.seconds(lambda ids=ids: subject.denoiser.hidden(ids))
        flops = subject.flops(rows, bench.size.length, 0)
        bench.add(f"body, {kind}", f"{subject.name}, B {rows}", seconds, flops)


def rollouts(bench: Bench, subject: Subject, kind: str, batches: tuple[int, ...]) -> None:
    """A block, ms per call, and how that is to the published loop where it has been timed."""
    block = bench.size.block
    for rows in batches:
        canvas = subject.canvas(bench, rows)
        steps = 8 if rows <= 6 else 4 if rows <= 24 else 2
        for name, settings in SETTINGS.items():
            one = Decoding(bench, subject, canvas, steps, settings)
            more: Row = {}
            with bench.peak(more):
                # the first setting of a batch warms up for the others
                seconds = bench.seconds(one.run, 1, warm=name != "greedy") / one.calls
            if theirs := bench.published.get((rows, name)):
                more["ratio"] = theirs / seconds
            flops = subject.flops(rows, bench.size.length, rows * (block + block / steps) / 2)
            what = f"{subject.name}, B {rows}, {name}"
            bench.add(f"rollout, {kind}", what, seconds, flops, calls=one.calls, **more)


@dataclass
class Decoding:
    """A rollout to be timed, and the calls that it took."""

    bench: Bench
    subject: Subject
    canvas: Canvas
    steps: int
    settings: dict[str, Any]
    calls: float = 1.0

    def run(self) -> None:
        """Ours."""
        rollout = decode(
            self.subject.denoiser,
            self.canvas,
            block_length=self.canvas.gen_length,
            steps=self.steps,
            stop_at_eos=False,
            generator=self.bench.generator(),
            **self.settings,
        )
        self.calls = float(rollout.nfe.max())

    @torch.no_grad()
    def run_published(self) -> None:
        """As the published loop does."""
        naive_decode(
            self.subject.denoiser,
            self.canvas.ids,
            gen_length=self.canvas.gen_length,
            block_length=self.canvas.gen_length,
            steps=self.steps,
            temperature=self.settings.get("temperature", 0.0),
            generator=self.bench.generator(),
        )


def published(bench: Bench, subject: Subject) -> None:
    """A call of the published loop; none where it needs more memory than there is."""
    for rows in (n for n in bench.size.batches if n <= 24):
        canvas = subject.canvas(bench, rows)
        steps = 8 if rows <= 6 else 4
        for name in ("greedy", "T .9"):
            one = Decoding(bench, subject, canvas, steps, SETTINGS[name])
            more: Row = {}
            with bench.peak(more):
                whole = bench.attempt(one.run_published)
            seconds = whole and whole / steps
            bench.published[rows, name] = seconds
            bench.add("published loop", f"{subject.name}, B {rows}, {name}", seconds, **more)


def group_of(bench: Bench, subject: Subject) -> Rollout:
    """Six rows, decoded."""
    canvas = subject.canvas(bench, 6)
    options = {"block_length": bench.size.block, "steps": 4, "stop_at_eos": False}
    rollout = decode(subject.denoiser, canvas, **options)
    return replace(rollout, completion_mask=~rollout.prompt_mask)


def scoring(bench: Bench, subject: Subject, kind: str) -> None:
    """The ELBO of a group with 3 views: forward only, then with its backward pass."""
    rollout = group_of(bench, subject)
    views = ESTIMATOR.make_views(rollout, subject.denoiser.mask_id, torch.Generator())
    canvases = views.ids.shape[0] * views.ids.shape[1]
    forward = subject.flops(canvases, bench.size.length, float((views.weight != 0).sum()))
    more: Row = {}

    def score() -> None:
        frozen_token_logps(subject.denoiser, rollout, ESTIMATOR, views, max_canvases=canvases)

    with bench.peak(more):
        seconds = bench.seconds(score)
    bench.add(f"scoring, {kind}", f"{subject.name}, {canvases} canvases", seconds, forward, **more)

    def update() -> None:
        backward_in_chunks(
            subject.denoiser,
            rollout,
            ESTIMATOR,
            views,
            lambda logps: LossOutputs(loss=logps.sum(), metrics={}),
            max_canvases=canvases,
        )
        subject.denoiser.model.zero_grad()

    module = subject.denoiser.model
    module.recompute = True
    more = {}
    with bench.peak(more):
        seconds = bench.attempt(update)
    module.recompute = False
    # recompute and gradients of inputs; of all weights as well if they are trained
    passes = 3 if kind.startswith("LoRA") else 4
    what = f"{subject.name}, {canvases} canvases, recomputed"
    bench.add(f"forward + backward, {kind}", what, seconds, passes * forward, **more)


def counts(bench: Bench, subject: Subject) -> None:
    """Synchronisations (CUDA only) and large float32 operators per call of a rollout."""
    canvas = subject.canvas(bench, 6)
    options: dict[str, Any] = {"block_length": bench.size.block, "stop_at_eos": True}
    for name in ("greedy", "T .9"):
        found = {}
        # the difference of two lengths is free of what a decoding does once
        for steps in (4, 8):
            wide = WideFloats(canvas.ids.numel() * subject.shape.d_model)
            with synchronisations(bench) as waits, wide:
                rollout = decode(
                    subject.denoiser,
                    canvas,
                    steps=steps,
                    generator=bench.generator(),
                    **options,
                    **SETTINGS[name],
                )
            said = sum("synchroniz" in str(w.message) for w in waits)
            found[steps] = (said, wide.count, float(rollout.nfe.max()))
        waited, wides, calls = (b - a for a, b in zip(found[4], found[8], strict=True))
        calls = max(calls, 1.0)
        row: Row = {"section": "per call", "what": f"{subject.name}, B 6, {name}"}
        row["synchronisations"] = waited / calls if bench.device.type == "cuda" else None
        bench.rows.append(row | {"float32_operators": wides / calls})


def whole_step(bench: Bench, subject: Subject) -> None:
    """The first step of a shipped recipe through ``unmaskrl.train``, on a model made here; its peak
    against the plan. The byte tokenizer stands in for the model's.
    """
    tokenizer = byte_tokenizer()
    ids = {"mask_id": tokenizer.mask_token_id, "eos_id": tokenizer.eos_token_id}
    denoiser = replace(subject.denoiser, pad_id=tokenizer.pad_token_id, **ids)
    changes: dict[str, Any] = {
        "model.compile": "none" if no_compiler(bench.device) else "blocks",
        "train.steps": 1,
        "eval.size": 1,
        "eval.size_during": 1,
        "task.train_size": 8,
        "task.eval_size": 4,
        "run.probe": False,
        "run.log_with": [],
    }
    if bench.size.layers == 0:
        small = {"train.prompts_per_step": 1, "train.group_size": 2, "train.num_iterations": 1}
        short = {"gen_length": 16, "block_length": 16, "steps": 4}
        changes |= small | {f"decode.{key}": value for key, value in short.items()}
        changes |= {"model.lora.rank": 2, "model.dtype": "float32", "model.compile": "none"}
        changes["run.threads"] = 1  # otherwise they are tried out for seconds
    found: Row = {}
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        base = (denoiser, tokenizer, None)
        with mock.patch.object(setup, "_open_base", lambda *_: base):
            begin = time.perf_counter()
            changes["run.out"] = f"{folder}/run"
            u.train(RECIPE, quiet=True, **changes)
            seconds = time.perf_counter() - begin
        step = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[0])
    found |= {key: step[key] for key in step if key.startswith("seconds/")}
    words = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    recipe = load_recipe(RECIPE, words)
    cuda = bench.device.type == "cuda"
    asked = Setup.of(recipe, subject.shape, cuda=cuda)
    plan = memory_plan(subject.shape, on_device(subject.shape, asked, this_machine(1)[1]))
    found["plan_gib"] = plan.total / GIB
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated(bench.device) / GIB
    bench.add("whole run", f"{RECIPE}, one step", seconds, **found)


def measure(bench: Bench) -> dict[str, Any]:
    """All sections, a model at a time."""
    ceilings(bench)
    of_dream(bench, Subject.of(bench, "Dream-7B"))
    gc.collect()
    of_llada(bench, Subject.of(bench, "LLaDA-8B"))
    gc.collect()
    whole_step(bench, Subject.of(bench, "LLaDA-8B"))
    return {"machine": machine_of(bench), "rows": bench.rows}


def of_dream(bench: Bench, subject: Subject) -> None:
    """Its body and its small batches: the rest is as LLaDA's."""
    body(bench, subject, "plain")
    rollouts(bench, subject, "plain", bench.size.batches[:2])


def of_llada(bench: Bench, subject: Subject) -> None:
    """As written, then compiled, then compiled with adapters."""
    module = subject.denoiser.model
    batches = bench.size.batches
    body(bench, subject, "plain")
    published(bench, subject)
    rollouts(bench, subject, "plain", batches)
    counts(bench, subject)
    module.requires_grad_(True)
    scoring(bench, subject, "all weights")
    module.requires_grad_(False)
    kind = "LoRA"
    if bench.device.type == "cuda" and not no_compiler(bench.device):
        compile_blocks(module)
        kind = "LoRA, compiled"
        body(bench, subject, "compiled")
        rollouts(bench, subject, "compiled", batches)
    add_lora(module, torch.Generator().manual_seed(0), rank=bench.size.rank, alpha=64.0)
    rollouts(bench, subject, kind, batches)
    scoring(bench, subject, kind)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_const", const="small", dest="size")
    sizes.add_argument("--cpu", action="store_const", const="cpu", dest="size")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    args = parser.parse_args(words)
    size = args.size or "real"
    if size != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --cpu tries the script")
    device = torch.device("cpu" if size == "cpu" else "cuda")
    dtype = torch.float32 if size == "cpu" else torch.bfloat16
    result = measure(Bench(SIZES[size], device, dtype))
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
