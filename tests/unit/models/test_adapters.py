"""LoRA: what is adapted; nothing changes at the start; merging is the same function; the reference
is the base; 4-bit bases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.conftest import same_maths, tiny_llada
from unmaskrl.models.adapters import (
    WithoutAdapters,
    add_lora,
    linear_names,
    lora_layers,
    merged_tensors,
    quantize_blocks,
    save_adapter,
)
from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.hub import asset
from unmaskrl.models.weights import start_average, swapped, trainable, update_average
from unmaskrl.recipes.load import load_recipe
from unmaskrl.recipes.schema import LoRAConfig, ModelConfig
from unmaskrl.training.setup import open_model

IDS = torch.arange(24).reshape(2, 12) % 7


def adapted(rank: int = 2, **settings: Any) -> tuple[ModelDenoiser, torch.Tensor]:
    denoiser = tiny_llada()
    before = denoiser.logits(IDS).detach()
    add_lora(denoiser.model, torch.Generator().manual_seed(1), rank=rank, alpha=4.0, **settings)
    return denoiser, before


def shake(model: nn.Module) -> None:
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)


def test_adapters_start_as_the_model_and_are_all_that_learns() -> None:
    state = torch.get_rng_state()
    denoiser, before = adapted()
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    assert torch.equal(denoiser.logits(IDS), before)
    model = denoiser.model
    sizes = [
        (layer.base_layer.in_features, layer.base_layer.out_features)
        for _, layer in lora_layers(model)
    ]
    blocks = model.config.n_layers  # type: ignore[union-attr]
    kinds = 7
    assert len(sizes) == blocks * kinds
    assert sum(p.numel() for p in trainable(model).values()) == sum(2 * (a + b) for a, b in sizes)
    assert not any(name == "model.transformer.ff_out" for name, _ in lora_layers(model)), (
        "the output head is no block's layer"
    )


def test_targets_are_names_of_the_family() -> None:
    denoiser, _ = adapted(targets=("q_proj", "ff_out"))
    assert {name.rpartition(".")[2] for name, _ in lora_layers(denoiser.model)} == {
        "q_proj",
        "ff_out",
    }
    with pytest.raises(
        ValueError,
        match=r"no linear layer is called 'o_proj'; the blocks have attn_out, ff_out, ff_proj",
    ):
        adapted(targets=("q_proj", "o_proj"))


def test_merged_weights_are_the_same_function_and_the_reference_is_the_base(tmp_path: Path) -> None:
    denoiser, before = adapted()
    names = set(tiny_llada().model.state_dict())
    shake(denoiser.model)
    after = denoiser.logits(IDS).detach()
    assert (after - before).abs().max() > 0.01
    reference = WithoutAdapters.of(denoiser, inner=denoiser)
    with torch.no_grad():
        assert torch.equal(reference.logits(IDS), before)
        assert torch.equal(denoiser.logits(IDS), after), "adapters stayed off"
    assert merged_tensors(denoiser.model, keep=False) == {}
    tensors = merged_tensors(denoiser.model)
    assert set(tensors) == names
    save_model(denoiser.model, tmp_path, tensors=tensors)
    assert same_maths(load_denoiser(tmp_path, dtype=torch.float64).logits(IDS), after)


def test_adapter_folder_is_readable_by_peft(tmp_path: Path) -> None:
    """peft loads the folder onto a fresh base and gives the trained logits."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    denoiser, _ = adapted()
    shake(denoiser.model)
    save_adapter(denoiser.model, tmp_path, "base", rank=2, alpha=4.0)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    kept = {
        k: v
        for k, v in settings.items()
        if k not in ("peft_type", "base_model_name_or_path", "revision")
    }
    fresh = tiny_llada()
    with torch.random.fork_rng():  # peft's own initial values are drawn globally
        inject_adapter_in_model(LoraConfig(**kept), fresh.model)
    tensors = {
        name.removeprefix("base_model.model."): t
        for name, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    loaded = set_peft_model_state_dict(fresh.model, tensors)
    assert not loaded.unexpected_keys
    with torch.no_grad():
        assert same_maths(fresh.logits(IDS), denoiser.logits(IDS))


def test_average_of_adapters_follows_them_and_is_put_in_and_out() -> None:
    denoiser, _ = adapted()
    average = start_average(denoiser.model)
    shake(denoiser.model)
    own = denoiser.logits(IDS).detach()
    update_average(average, denoiser.model, 0.5)
    name, p = next(iter(trainable(denoiser.model).items()))
    with swapped(denoiser.model, average):
        assert torch.equal(p, average[name])
        assert not torch.equal(denoiser.logits(IDS), own)
    assert torch.equal(denoiser.logits(IDS), own)


def test_bfloat16_base_has_float32_adapters() -> None:
    denoiser = tiny_llada()
    denoiser.model.to(torch.bfloat16)
    add_lora(denoiser.model, torch.Generator().manual_seed(1), rank=2, alpha=64.0)
    assert {p.dtype for p in trainable(denoiser.model).values()} == {torch.float32}
    assert denoiser.logits(IDS).dtype == torch.bfloat16
    assert {t.dtype for t in merged_tensors(denoiser.model).values()} == {torch.bfloat16}


def test_linear_names_are_those_inside_blocks() -> None:
    names = linear_names(tiny_llada().model)
    assert len(names) == 7 * tiny_llada().model.config.n_layers  # type: ignore[union-attr]
    assert all("blocks." in name for name in names)


@pytest.mark.parametrize("targets", [None, ("q_proj",)])
def test_four_bit_base_trains_adapters_and_merges_what_it_computes(
    tmp_path: Path, targets: tuple[str, ...] | None
) -> None:
    """NF4 blocks: near the base, adapters get gradients, merged weights (of layers without adapters
    too) give its logits.
    """
    pytest.importorskip("bitsandbytes")
    base = load_denoiser(asset("mini"))
    denoiser = load_denoiser(asset("mini"))
    quantize_blocks(denoiser.model, torch.device("cpu"), torch.float32)
    add_lora(denoiser.model, torch.Generator().manual_seed(1), rank=2, targets=targets, alpha=64.0)
    shake(denoiser.model)
    ids = torch.arange(24).reshape(2, 12)
    logits = denoiser.logits(ids)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in trainable(denoiser.model).values())
    with torch.no_grad():
        plain = WithoutAdapters.of(denoiser, inner=denoiser).logits(ids)
    assert 1e-4 < (plain - base.logits(ids)).std() / base.logits(ids).std() < 0.5
    save_model(denoiser.model, tmp_path, tensors=merged_tensors(denoiser.model))
    error = load_denoiser(tmp_path).logits(ids) - logits
    # the 4-bit product rounds more coarsely than float32
    assert error.norm() < 1e-3 * logits.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.quantize=nf4"], "4-bit weights cannot be trained; set model.lora.rank"),
        (
            ["train.shard=fsdp", "model.quantize=nf4", "model.lora.rank=4"],
            "4-bit blocks cannot be split",
        ),
        (["train.shard=zero2", "model.rollout_dtype=bfloat16"], "set rollout_dtype=null"),
        (["model.lora.rnk=4"], "model.lora.rnk: unknown setting; did you mean 'rank'"),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("sudoku-mini", settings)


@pytest.mark.parametrize("family", ["GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_activation_checkpointing_changes_memory_and_no_number(
    family: str, lora: LoRAConfig | None
) -> None:
    """Same gradients to the bit; what a pass keeps for its backward falls to the blocks' inputs."""
    saved = {}
    grads = {}
    for recompute in (False, True):
        section = ModelConfig(
            path=family, random_init="tiny", lora=lora, activation_checkpointing=recompute
        )
        denoiser, _, _ = open_model(section, "cpu")
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            hidden = denoiser.hidden(torch.arange(80).reshape(2, 40))
        hidden.square().sum().backward()
        saved[recompute] = sum(sizes)
        grads[recompute] = {
            name: p.grad for name, p in trainable(denoiser.model).items() if p.grad is not None
        }
    assert saved[True] < 0.3 * saved[False]
    assert grads[True].keys() == grads[False].keys() and len(grads[True]) > 10
    assert all(torch.equal(grads[True][name], grad) for name, grad in grads[False].items())
