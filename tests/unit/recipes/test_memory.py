"""The memory plan: counts by hand, limits, verdicts, and what a model really keeps, measured on
CPU.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.conftest import seeded
from unmaskrl import load_denoiser
from unmaskrl.core.canvas import blank_canvas
from unmaskrl.core.decoding import decode
from unmaskrl.core.scoring import target_logps
from unmaskrl.models.adapters import add_lora
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.families import FAMILIES
from unmaskrl.models.families.family import CPU_CHUNK
from unmaskrl.models.families.llada import LLaDA, LLaDAConfig
from unmaskrl.models.hub import ASSETS
from unmaskrl.recipes.cost import step_cost
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.memory import (
    CPU_TOKENS,
    GIB,
    HEADROOM,
    ModelShape,
    Setup,
    adapted_layers,
    backward_bytes,
    largest_max_canvases,
    memory_plan,
    model_shape,
    recomputed_bytes,
    rollout_bytes,
    saved_bytes,
    saved_per_token,
    smaller_settings,
    verdict,
)
from unmaskrl.recipes.schema import ModelConfig


def released(model_type: str) -> ModelShape:
    """The shape of a family's released models."""
    family = FAMILIES[model_type]
    return ModelShape.of(family.read(dict(family.released or {})), family)


def mini_shape() -> ModelShape:
    shape = model_shape(ModelConfig())
    assert shape is not None
    return shape


LLADA_8B = released("llada")
DREAM_7B = released("Dream")
ALL = adapted_layers(None, LLADA_8B)
TOLERANCE = 0.15
FULL = Setup(
    dtype=2,
    rollout_dtype=2,
    rank=0,
    roles=(),
    adapter_dtype=4,
    nf4=False,
    checkpointing=False,
    reference=False,
    ema=True,
    optimizer="adamw",
    state_share=2.0,
    shard="none",
    gather_rollout=False,
    processes=1,
    max_canvases=4,
    canvases=72,
    scored=256,
    length=512,
    gen_length=256,
    window=32,
    train_rows=24,
    eval_rows=24,
    cuda=True,
)
LORA = replace(FULL, rank=128, roles=ALL)


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage()._cdata not in self.known.keys() | given
            ):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


def saved_storages(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the distinct storages that a forward pass saves for the backward pass, weights
    apart.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            # alive, so that no address is used twice
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    body: Any = model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = body.hidden(ids)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def wide(dtype: torch.dtype, *, kv: int = 8, vocab: int = 5000, **other: Any) -> ModelDenoiser:
    """A random model of LLaDA-8B's proportions."""
    sizes = {"d_model": 256, "n_heads": 8, "n_layers": 3, "mlp_hidden_size": 768, **other}
    ids = {"mask_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = LLaDAConfig(**sizes, **ids, n_kv_heads=kv, vocab_size=vocab, embedding_size=vocab)
    return ModelDenoiser.from_model(LLaDA(config).init_weights(seeded()).to(dtype))


def shape_of(denoiser: ModelDenoiser) -> ModelShape:
    config: Any = denoiser.model.config
    return ModelShape.of(config, FAMILIES["llada"])


def on_cpu(dtype: torch.dtype, rows: int, length: int, gen: int, **other: Any) -> Setup:
    """A setup of ``rows`` canvases, all of whose completion is scored."""
    size = {
        "dtype": dtype.itemsize,
        "rollout_dtype": dtype.itemsize,
        "canvases": rows,
        "max_canvases": rows,
    }
    canvas = {
        "length": length,
        "gen_length": gen,
        "scored": gen,
        "window": gen // 2,
        "train_rows": rows,
        "eval_rows": rows,
    }
    return replace(FULL, **size, **canvas, cuda=False, **other)


@pytest.mark.parametrize(
    ("shape", "parameters"), [(LLADA_8B, 8_015_581_184), (DREAM_7B, 7_615_616_512)]
)
def test_published_sizes(shape: ModelShape, parameters: int) -> None:
    assert shape.parameters == parameters


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv": 2},
        {"weight_tying": True},
        {"include_bias": True},
        {"include_qkv_bias": True, "kv": 2},
    ],
)
def test_parameters_are_those_of_the_module(settings: dict[str, Any]) -> None:
    denoiser = wide(torch.float32, **settings)
    assert shape_of(denoiser).parameters == sum(p.numel() for p in denoiser.model.parameters())


def test_shipped_models_have_a_shape_and_others_are_refused() -> None:
    cost = step_cost(load_recipe("sudoku-mini"))
    shape = mini_shape()
    assert (shape.vocab, shape.parameters) == (120, cost.parameters)
    with pytest.raises(ValueError, match=r"nowhere is not a folder, nor a hub id"):
        model_shape(ModelConfig(path="nowhere"))


def test_a_family_that_names_no_linear_layers_has_no_plan() -> None:
    llada = FAMILIES["llada"]
    config = llada.read(dict(llada.released or {}))
    with pytest.raises(ValueError, match="linears names no layer for 'down'"):
        ModelShape.of(config, replace(llada, linears={"q_proj": "q", "k_proj": "k"}))


def test_adapters_are_rank_times_inputs_and_outputs() -> None:
    shape = DREAM_7B
    d = 3584
    kv = 512
    mlp = 18944
    attention = 2 * (d + d) + 2 * (d + kv)
    assert shape.adapter_parameters(16, ALL) == 28 * 16 * (attention + 3 * (d + mlp))
    assert shape.adapter_parameters(8, adapted_layers(("q_proj", "v_proj"), shape)) == 28 * 8 * (
        d + d + d + kv
    )
    assert adapted_layers(("o_proj", "o_proj"), shape) == ("out",)
    with pytest.raises(ValueError, match=r"'q' is no linear layer of a block; known: q_proj, "):
        adapted_layers(("q",), shape)
    stays = memory_plan(shape, replace(LORA, rank=16)).stays
    count = shape.adapter_parameters(16, ALL)
    assert (
        stays["adapters"] == stays["gradients"] == 4 * count
        and stays["optimiser state (adamw)"] == 8 * count
    )
    assert stays["weights"] == 2 * shape.parameters and "reference copy" not in stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_keeps_two_numbers_in_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(64, 8, dtype=dtype))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [t for key, t in optimizer.state[weight].items() if key != "step"]
    held = sum(t.numel() * t.element_size() for t in state)
    shape = LLADA_8B
    setup = replace(FULL, dtype=dtype.itemsize)
    planned = memory_plan(shape, setup).stays["optimiser state (adamw)"] / shape.parameters
    assert held / weight.numel() == planned == 2 * dtype.itemsize


def test_sharding_divides_what_it_says() -> None:
    """The blocks' share of every kind of state; embedding and head stay whole; zero2 has whole
    blocks during a pass.
    """
    shape = LLADA_8B
    outer = 2 * 126464 * 4096 + 4096
    blocks = shape.parameters - outer
    per_parameter = {
        "weights": 2,
        "gradients": 2,
        "optimiser state (adamw)": 4,
        "weight average (EMA)": 4,
    }

    def stays(**changes: Any) -> dict[str, float]:
        return memory_plan(shape, replace(FULL, processes=8, **changes)).stays

    for shard, held in {
        "none": shape.parameters,
        "fsdp": outer + blocks / 8,
        "zero2": outer + blocks / 8,
    }.items():
        plan = stays(shard=shard)
        assert {name: plan[name] for name in per_parameter} == {
            name: size * held for name, size in per_parameter.items()
        }
    assert (
        stays(shard="zero2")["gathered blocks"]
        == 16 * stays(shard="fsdp")["gathered blocks"]
        == 2 * blocks
    )
    assert (
        stays(shard="fsdp", gather_rollout=True)["whole copy for rollouts"] == 2 * shape.parameters
    )
    adapted = memory_plan(shape, replace(LORA, processes=8, shard="fsdp")).stays
    assert adapted["adapters"] == memory_plan(shape, LORA).stays["adapters"] / 8
    assert "weight average (EMA)" not in stays(ema=False)


def test_4_bits_and_the_reference_copy() -> None:
    shape = LLADA_8B
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    plain = memory_plan(shape, LORA).stays
    small = memory_plan(shape, replace(LORA, nf4=True)).stays
    assert plain["weights"] - small["weights"] == linear * (2 - 0.5625)
    copied = memory_plan(shape, replace(FULL, reference=True)).stays
    assert copied["reference copy"] == copied["weights"]


@pytest.mark.parametrize("base", [FULL, LORA, replace(LORA, nf4=True, checkpointing=True)])
def test_more_canvases_need_more_until_all_are_alive(base: Setup) -> None:
    shape = LLADA_8B
    totals = [memory_plan(shape, replace(base, max_canvases=n)).total for n in range(1, 80)]
    assert all(a < b for a, b in itertools.pairwise(totals[15:72])) and sorted(totals) == totals
    assert len(set(totals[71:])) == 1  # 72 canvases are all
    limit = totals[19]
    assert (
        largest_max_canvases(shape, base, limit) == 20
        and largest_max_canvases(shape, base, totals[0] - 1) == 0
    )
    assert largest_max_canvases(shape, base, 1e15) == 72


def test_checkpointing_and_adapters_need_less() -> None:
    shape = LLADA_8B
    assert (
        memory_plan(shape, replace(FULL, checkpointing=True)).activations
        < 0.2 * memory_plan(shape, FULL).activations
    )
    assert memory_plan(shape, LORA).total < memory_plan(shape, FULL).total / 2
    # layers that read the same share what is kept for their adapters, in the dtype of the weights
    block, _ = saved_per_token(shape, LORA)
    frozen, _ = saved_per_token(shape, replace(LORA, roles=()))
    assert block - frozen == 2 * (2 * 4096 + 12288) + 7 * 128 * 2


def test_verdicts_say_what_fits_and_what_to_change() -> None:
    shape = LLADA_8B
    setup = replace(LORA, max_canvases=8)
    need = memory_plan(shape, setup).total / GIB
    fits = verdict(shape, setup, "80 GB", 80)
    most = largest_max_canvases(shape, setup, HEADROOM * 80 * GIB)
    assert (
        fits == f"80 GB: fits ({need:.1f} GiB); train.max_canvases may be up to {most} (an update "
        "has 72)"
    )
    said = verdict(shape, setup, "24 GB", 24)
    assert said.startswith(f"24 GB: does not fit ({need:.1f} GiB); smaller: train.max_canvases=")
    assert said.endswith(" model.quantize=nf4") and "lora" not in said
    assert "no setting here makes it fit" in verdict(shape, setup, "4 GB", 4)


def test_split_weights_are_not_put_into_4_bits() -> None:
    split = replace(LORA, processes=8, shard="fsdp", gather_rollout=True)
    shape = LLADA_8B
    assert "train.gather_rollout=false" in verdict(shape, split, "24 GB", 24)
    assert "nf4" not in verdict(shape, split, "24 GB", 24) + verdict(shape, split, "8 GB", 8)


@pytest.mark.parametrize(
    "base", [FULL, replace(FULL, processes=8), LORA, replace(LORA, eval_rows=4096)]
)
@pytest.mark.parametrize("gib", [12, 16, 24, 48, 80])
def test_suggested_settings_fit(base: Setup, gib: int) -> None:
    shape = LLADA_8B
    limit = HEADROOM * gib * GIB
    if memory_plan(shape, base).total <= limit:
        return
    text = smaller_settings(shape, base, limit)
    changed = base
    for word in text.replace("={rank: 128}", "=128").split():
        key, value = word.split("=")
        fields: dict[str, dict[str, Any]] = {
            "train.max_canvases": {"max_canvases": int(value) if value.isdigit() else 0},
            "eval.batch_size": {"eval_rows": int(value) if value.isdigit() else 0},
            "model.activation_checkpointing": {"checkpointing": True},
            "train.shard": {"shard": "fsdp"},
            "train.gather_rollout": {"gather_rollout": False},
            "model.lora": {"rank": 128, "roles": ALL},
            "model.quantize": {"nf4": True},
        }
        changed = replace(changed, **fields[key])
    assert (memory_plan(shape, changed).total <= limit) == bool(text)
    # 8B in 4 bits with adapters, their gradients and AdamW needs 12 GiB, its 24 rollouts .4 more
    assert bool(text) == (gib > 12)


def test_a_recipe_becomes_a_setup() -> None:
    size = [
        "train.prompts_per_step=3",
        "train.group_size=4",
        "train.max_canvases=5",
        "eval.batch_size=7",
        "decode.exit_at=0.9",
    ]
    recipe = load_recipe(
        "sudoku-mini-elbo",
        [*size, "model.lora={rank: 8, targets: [q_proj]}", "model.dtype=bfloat16"],
    )
    setup = Setup.of(recipe, mini_shape(), processes=2, prompt_tokens=19, cuda=False)
    assert (setup.dtype, setup.adapter_dtype, setup.rank, setup.roles) == (2, 4, 8, ("q",))
    assert (setup.train_rows, setup.eval_rows, setup.alive, setup.length, setup.window) == (
        8,
        7,
        5,
        39,
        20,
    )
    assert not setup.reference and setup.shard == "none"
    plan = memory_plan(mini_shape(), setup)
    assert plan.logits == 5 * 20 * 120 * 6  # logits in bf16 and in fp32
    whole = Setup.of(load_recipe("sudoku-mini-elbo", ["loss.kl_coef=0.04"]), mini_shape())
    assert (
        whole.reference
        and whole.alive == whole.canvases == step_cost(load_recipe("sudoku-mini-elbo")).new // 4
    )
    one = Setup.of(load_recipe("sudoku-mini"), mini_shape())
    assert (
        memory_plan(mini_shape(), one).logits == step_cost(load_recipe("sudoku-mini")).logits_bytes
    )


def test_cpu_batches_are_cut_as_the_plan_says() -> None:
    assert CPU_TOKENS == CPU_CHUNK


@pytest.mark.parametrize("kv", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_of_a_wide_model(dtype: torch.dtype, kv: int) -> None:
    denoiser = wide(dtype, kv=kv)
    ids = torch.randint(2, 5000, (6, 80), generator=seeded(1))
    planned = saved_bytes(shape_of(denoiser), replace(on_cpu(dtype, 6, 80, 40), scored=0))
    assert saved_storages(denoiser.model, ids) == pytest.approx(planned, rel=TOLERANCE)


def test_saved_activations_of_the_mini_base() -> None:
    denoiser = load_denoiser(ASSETS / "mini")
    ids = torch.randint(2, 120, (60, 39), generator=seeded(1))
    planned = saved_bytes(shape_of(denoiser), replace(on_cpu(torch.float32, 60, 39, 20), scored=0))
    assert saved_storages(denoiser.model, ids) == pytest.approx(planned, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, ("q_proj", "v_proj")),
        (torch.bfloat16, ("q_proj", "ff_out")),
    ],
)
@pytest.mark.parametrize("rank", [4, 64])
def test_saved_activations_with_adapters(dtype: torch.dtype, targets: Any, rank: int) -> None:
    denoiser = wide(dtype, n_layers=6)
    add_lora(denoiser.model, seeded(), rank=rank, alpha=8.0, targets=targets)
    shape = shape_of(denoiser)
    roles = adapted_layers(targets, shape)
    trained = sum(p.numel() for p in denoiser.model.parameters() if p.requires_grad)
    assert trained == shape.adapter_parameters(rank, roles)
    ids = torch.randint(2, 5000, (6, 80), generator=seeded(1))
    setup = on_cpu(dtype, 6, 80, 40, rank=rank, roles=roles, adapter_dtype=4)
    planned = saved_bytes(shape, replace(setup, scored=0))
    assert saved_storages(denoiser.model, ids) == pytest.approx(planned, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "vocab"), [(torch.float32, 5000), (torch.bfloat16, 5000), (torch.bfloat16, 100_000)]
)
def test_the_peak_of_an_update(dtype: torch.dtype, vocab: int, checkpointing: bool) -> None:
    """All storages alive in forward and backward, beside weights and gradients; at 100,000 tokens
    there are 2 chunks.

    There the head is frozen, as with adapters: this way of measuring makes torch add its gradients
    out of place.
    """
    small = (
        {}
        if dtype == torch.float32
        else {"d_model": 64, "n_heads": 2, "kv": 2, "mlp_hidden_size": 192}
    )
    denoiser = wide(dtype, vocab=vocab, **small)
    (rows, length, gen) = (6, 120, 60 if vocab == 5000 else 20)
    model: Any = denoiser.model
    parts = model.model["transformer"]
    if checkpointing:
        for block in parts["blocks"]:
            forward = block.forward
            block.forward = lambda *given, f=forward: checkpoint(
                f, *given, use_reentrant=False, preserve_rng_state=False
            )
    ids = torch.randint(2, vocab, (rows, length), generator=seeded(1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    setup = on_cpu(dtype, rows, length, gen, checkpointing=checkpointing)
    shape = shape_of(denoiser)
    plan = memory_plan(shape, setup)
    planned = plan.update
    if vocab > 5000:
        parts["ff_out"].requires_grad_(False)
        parts["wte"].requires_grad_(False)
        work = recomputed_bytes(shape, setup) + backward_bytes(shape, setup, rows * length)
        planned = saved_bytes(shape, setup) + max(plan.logits, work)
    with Allocations() as memory:
        hidden = denoiser.hidden(ids)[:, -gen:].flatten(0, 1)
        target_logps(denoiser, hidden, ids[:, -gen:].flatten(), 1.0).sum().backward()
    assert memory.peak == pytest.approx(planned, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "vocab"), [(torch.float32, 100_000), (torch.bfloat16, 100_000), (torch.bfloat16, 500)]
)
def test_the_peak_of_a_rollout(dtype: torch.dtype, vocab: int) -> None:
    """At 100,000 tokens it is a chunk of logits, at 500 a block on 2,048 tokens."""
    denoiser = wide(dtype, vocab=vocab, n_layers=1)
    (rows, length, gen) = (20, 120, 16)
    canvas = blank_canvas([[2] * (length - gen)] * rows, gen_length=gen, denoiser=denoiser)
    with Allocations() as memory:
        decode(
            denoiser, canvas, block_length=gen // 2, steps=2, temperature=0.7, generator=seeded(1)
        )
    planned = rollout_bytes(shape_of(denoiser), on_cpu(dtype, rows, length, gen))
    assert memory.peak == pytest.approx(planned, rel=TOLERANCE)
