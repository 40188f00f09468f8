"""The memory plan of block-causal families: what their models really keep, and sizes by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import seeded
from tests.unit.models.block_models import small_model
from tests.unit.recipes.test_memory import TOLERANCE, on_cpu, saved_storages
from unmaskrl.models.families import FAMILIES, known_config, parse_config
from unmaskrl.models.families.block import BlockCausalModel
from unmaskrl.recipes.memory import memory_plan, rollout_bytes, saved_bytes
from unmaskrl.recipes.shape import ModelShape, adapted_layers

WIDE: dict[str, Any] = {
    "d_model": 192,
    "n_heads": 8,
    "n_kv_heads": 2,
    "n_layers": 3,
    "head_size": 32,
    "mlp_hidden_size": 512,
    "vocab_size": 500,
    "max_sequence_length": 512,
}
EXPERTS: dict[str, Any] = {"n_experts": 12, "top_experts": 4, "expert_size": 96}


def wide(family: str, dtype: torch.dtype) -> tuple[BlockCausalModel, ModelShape]:
    sizes = WIDE | (EXPERTS if family != "sdar" else {})
    model = small_model(family, dtype=dtype, **sizes)
    return model, ModelShape.of(model.config, FAMILIES[family])


@pytest.mark.parametrize("family", ["sdar", "sdar_moe", "llada2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_activations_of_doubled_canvases(family: str, dtype: torch.dtype) -> None:
    model, shape = wide(family, dtype)
    ids = torch.randint(2, 400, (6, 160), generator=seeded(1))
    setup = replace(on_cpu(dtype, 6, 80, 40), scored=0, doubled=True)
    measured = saved_storages(model, ids)
    assert measured == pytest.approx(saved_bytes(shape, setup), rel=TOLERANCE)


def released(hub_id: str) -> ModelShape:
    raw = known_config(hub_id)
    assert raw is not None
    return ModelShape.of(*parse_config(raw, hub_id))


def test_a_dense_models_sizes_by_hand() -> None:
    shape = released("JetLM/SDAR-4B-Chat")
    assert (shape.d_model, shape.heads, shape.kv, shape.mlp, shape.block_length) == (
        2560,
        4096,
        1024,
        9728,
        4,
    )
    layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728
    assert shape.in_linears == 36 * layer
    both = 2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)
    assert shape.adapter_parameters(8, adapted_layers(None, shape)) == 36 * 8 * both


def test_experts_are_counted_and_not_adapted() -> None:
    shape = released("inclusionAI/LLaDA2.0-mini")
    assert shape.experts == 8 and shape.mlp == max(9 * 512, 5120)
    assert shape.parameters - shape.in_linears == pytest.approx(2 * 157184 * 2048, rel=0.02)
    roles = adapted_layers(None, shape)
    assert roles == ("qkv", "out")
    assert shape.adapter_parameters(16, roles) == 20 * 16 * (2048 + 24 * 128 + 2048 + 2048)
    dense_and_shared = 16 * ((2048 + 5120) + 19 * (2048 + 512))
    assert shape.adapter_parameters(16, adapted_layers(("up_proj",), shape)) == dense_and_shared


def test_caches_are_as_large_as_the_plan_says() -> None:
    model, shape = wide("llada2_moe", torch.bfloat16)
    assert model.new_cache(5, 33).num_bytes == shape.cache_bytes(5, 33, 2)
    setup = on_cpu(torch.bfloat16, 20, 120, 16)
    longer = replace(setup, length=1120, gen_length=1016)  # the same prompts
    more = rollout_bytes(shape, longer) - rollout_bytes(shape, setup)
    kept = shape.cache_bytes(20, 1000, 2)
    assert kept < more < 2 * kept
    assert memory_plan(shape, longer).rollout == rollout_bytes(shape, longer)
