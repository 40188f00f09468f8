"""Block-causal models in what stands around a denoiser: adapters, copies, signals, recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import unmaskrl as u
from tests.conftest import same_maths, seeded
from tests.unit.models.block_models import decode_greedily, random_ids, small
from tests.unit.models.test_block_families import chat_model
from unmaskrl.models.adapter_folder import put_on
from unmaskrl.models.adapters import (
    WithoutAdapters,
    add_lora,
    linear_names,
    lora_layers,
    merged_tensors,
    quantize_blocks,
    save_adapter,
)
from unmaskrl.models.denoiser import ModelDenoiser
from unmaskrl.models.weights import frozen_copy
from unmaskrl.recipes.schema import ModelConfig
from unmaskrl.training.ranks.watched import watched
from unmaskrl.training.setup import open_model


def shaken(family: str, targets: list[str] | None = None) -> ModelDenoiser:
    """With adapters that are not zero."""
    den = small(family)
    add_lora(den.model, seeded(), rank=2, alpha=4.0, targets=targets)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in den.model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=seeded(i)) * 0.3)
    return den


def test_without_adapters_a_cache_holds_the_bases_keys() -> None:
    base = small("sdar")
    den = shaken("sdar")
    reference = WithoutAdapters.of(den, inner=den)
    prompt = random_ids(1, 6)[0]
    want, logps = decode_greedily(base, prompt, 8, cached=True)
    got, same = decode_greedily(reference, prompt, 8, cached=True)
    _, other = decode_greedily(den, prompt, 8, cached=True)
    assert torch.equal(got, want) and same_maths(same, logps, size=10)
    assert (other - logps).abs().max() > 1e-3


def test_a_signal_is_looked_at_before_every_call() -> None:
    looks: list[int] = []
    den = watched(small("sdar"), lambda: looks.append(1))
    decode_greedily(den, random_ids(1, 4)[0], 4, cached=True)
    assert len(looks) == 1 + 4 + 1  # prompt, four tokens, the clean pass
    assert den.block_length == 4


@pytest.mark.parametrize("family", ["sdar_moe", "llada2_moe"])
def test_adapters_of_models_with_experts_merge_and_load(family: str, tmp_path: Path) -> None:
    targets = ["dense", "up_proj"] if family == "llada2_moe" else None
    den = shaken(family, targets)
    ids = random_ids(2, 9)
    with torch.no_grad():
        want = den.hidden(ids)
    merged = frozen_copy(small(family))
    merged.model.load_state_dict(merged_tensors(den.model))
    save_adapter(den.model, tmp_path, "nowhere/base", rank=2, alpha=4.0)
    put = small(family)
    put_on(put.model, tmp_path)
    for other in (merged, put):
        with torch.no_grad():
            assert same_maths(other.hidden(ids), want, units=2**20)  # adapters are float32
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    named = {name for name in linear_names(small(family).model) if re.fullmatch(pattern, name)}
    assert named == {name for name, _ in lora_layers(den.model)}


def test_experts_in_four_bits() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"d_model": 64, "expert_size": 64, "mlp_hidden_size": 64, "dtype": torch.float32}
    exact = small("llada2_moe", **sizes)
    rough = small("llada2_moe", **sizes)
    quantize_blocks(rough.model, torch.device("cpu"), torch.float32)
    ids = random_ids(2, 8)
    with torch.no_grad():
        a = exact.hidden(ids)
        b = rough.hidden(ids)
    assert 0 < (b - a).norm() / a.norm() < 0.8
    gate = rough.model.state_dict()["model.layers.1.mlp.gate.weight"]
    assert torch.equal(gate, exact.model.state_dict()["model.layers.1.mlp.gate.weight"])


def test_a_recipe_gives_what_config_json_lacks() -> None:
    stand_in = {"path": "inclusionAI/LLaDA2.0-mini", "random_init": "tiny"}
    den, _, _ = open_model(ModelConfig(**stand_in, block_length=6), "cpu")
    assert den.block_length == 6
    den, _, _ = open_model(ModelConfig(**stand_in), "cpu")
    assert den.block_length == 32
    with pytest.raises(ValueError, match="block_length"):
        ModelConfig(block_length=0)
    with pytest.raises(ValueError, match=r"model\.block_length: llada has none"):
        open_model(ModelConfig(path="mini", block_length=4), "cpu")


def test_an_adapter_loads_on_a_base_that_states_no_ids(tmp_path: Path) -> None:
    chat_model("llada2_moe", tmp_path / "base")
    given = {"mask_id": 0, "eos_id": 1, "block_length": 4}
    den = u.load(tmp_path / "base", device="cpu", **given).denoiser
    add_lora(den.model, seeded(), rank=2, alpha=4.0)
    save_adapter(den.model, tmp_path / "adapter", str(tmp_path / "base"), rank=2, alpha=4.0)
    again = u.load(tmp_path / "adapter", device="cpu", **given).denoiser
    assert (again.mask_id, again.eos_id, again.block_length) == (0, 1, 4)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*model\.mask_id"):
        u.load(tmp_path / "adapter", device="cpu")
