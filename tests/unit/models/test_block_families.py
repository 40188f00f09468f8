"""SDAR, SDAR-MoE and LLaDA2: configs, what a config.json may lack, released sizes, files, chat
templates; the layers against transformers' Qwen3.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmaskrl as u
from tests.conftest import same_maths, seeded
from tests.unit.models.block_models import FAMILIES, random_ids, small_model
from unmaskrl.core.block_causal import block_positions, block_visible
from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.families import FAMILIES as SHIPPED
from unmaskrl.models.families import Given, known_config, parse_config
from unmaskrl.models.loading import random_tiny
from unmaskrl.models.tokenizer import build_byte_tokenizer, end_of_turn_ids, load_tokenizer

IDS = {"mask_token_id", "eos_token_id", "pad_token_id", "block_size"}


def released(family: str) -> dict[str, Any]:
    return dict(SHIPPED[family].released or {})


def read(raw: dict[str, Any], **given: int) -> Any:
    return parse_config(raw, "here", given=Given(**given))[0]


@pytest.mark.parametrize(
    ("family", "mask", "block"), [("sdar", 151669, 4), ("sdar_moe", 151669, 4)]
)
def test_sdar_without_mask_and_block_has_the_released_ones(
    family: str, mask: int, block: int
) -> None:
    silent = {k: v for k, v in released(family).items() if k not in IDS - {"eos_token_id"}}
    config = read(silent)
    assert (config.mask_token_id, config.block_length) == (mask, block)
    assert (config.eos_token_id, config.pad_token_id, config.head_dim) == (151643, 151643, 128)
    assert config.to_dict() == silent  # nothing is added to what was read


def test_llada2_states_no_ids_and_no_block() -> None:
    raw = released("llada2_moe")
    assert not raw.keys() & (IDS - {"pad_token_id"})
    config = read(raw)
    ids = (config.mask_token_id, config.eos_token_id, config.pad_token_id)
    assert ids == (156895, 156892, 156892) and config.block_length == 32
    assert (
        config.rotary_dim == 64 and read({**raw, "partial_rotary_factor": None}).rotary_dim == 128
    )
    assert config.to_dict() == raw


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_given_counts_and_is_written(family: str) -> None:
    config = read(released(family), mask_id=7, eos_id=8, block_length=16)
    assert (config.mask_token_id, config.eos_token_id, config.block_length) == (7, 8, 16)
    written = config.to_dict()
    assert (written["mask_token_id"], written["eos_token_id"], written["block_size"]) == (7, 8, 16)
    assert read(written) == config
    with pytest.raises(ValueError, match=r"mask_token_id 999999 is not in .*; model.mask_id sets"):
        read(released(family), mask_id=999999)
    with pytest.raises(ValueError, match="block_size is 0; expected at least 1"):
        read(released(family), block_length=0)


def test_full_attention_has_no_block_to_give() -> None:
    with pytest.raises(ValueError, match=r"model.block_length: llada has none .its"):
        read(released("llada"), block_length=4)
    assert read(released("llada"), mask_id=5).mask_token_id == 5
    assert u.load_denoiser(u_assets("mini")).block_length is None


def u_assets(name: str) -> str:
    from unmaskrl.models.hub import asset

    return asset(name)


def test_the_block_of_a_released_model_is_in_its_name() -> None:
    assert (known_config("JetLM/SDAR-8B-Chat-b16") or {})["block_size"] == 16
    assert (known_config("JetLM/SDAR-8B-Chat") or {})["block_size"] == 4
    silent = {k: v for k, v in released("sdar").items() if k != "block_size"}
    for name, raw, block in (
        ("here/SDAR-4B-Chat-b32/", silent, 32),
        ("here/SDAR-4B-Chat", silent, 4),
        ("here/SDAR-4B-Chat-b32", released("sdar"), 4),  # config.json says so
    ):
        config: Any = parse_config(raw, "here", name=name)[0]
        assert config.block_length == block


@pytest.mark.parametrize(
    ("hub_id", "tensors", "parameters"),
    [
        ("JetLM/SDAR-1.7B-Chat", 311, None),
        ("JetLM/SDAR-4B-Chat", 399, 8_822_848_512 // 2),
        ("JetLM/SDAR-8B-Chat", 399, 16_381_470_720 // 2),
        ("Gen-Verse/TraDo-4B-Instruct", 399, 8_822_848_512 // 2),
        ("JetLM/SDAR-30B-A3B-Chat", 18_867, 61_064_245_248 // 2),
        ("inclusionAI/LLaDA2.0-mini", 14_813, None),
    ],
)
def test_released_sizes_are_the_published_ones(
    hub_id: str, tensors: int, parameters: int | None
) -> None:
    raw = known_config(hub_id)
    assert raw is not None
    config, family = parse_config(raw, hub_id)
    state = family.build(config).state_dict()
    assert len(state) == tensors
    count = sum(t.numel() for t in state.values())
    if parameters is not None:
        assert count == parameters
    elif "mini" in hub_id:
        assert 2 * count == pytest.approx(32.51e9, rel=1e-3)


def test_flash_is_larger_than_mini() -> None:
    flash = read(known_config("inclusionAI/LLaDA2.0-flash-preview") or {})
    assert (flash.d_model, flash.n_layers, flash.expert_size) == (4096, 32, 1024)
    assert read(known_config("inclusionAI/LLaDA2.1-mini") or {}).d_model == 2048


@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        ("sdar", "attention_bias", True, "SDAR config has attention_bias=True; only False"),
        ("sdar", "use_sliding_window", True, "use_sliding_window=True"),
        ("sdar", "rope_scaling", {"type": "yarn"}, "rope_scaling="),
        ("sdar", "head_dim", 7, "7 values of a head are rotated; expected pairs"),
        ("sdar_moe", "mlp_only_layers", [0], "mlp_only_layers="),
        ("sdar_moe", "decoder_sparse_step", 2, "decoder_sparse_step=2"),
        ("sdar_moe", "num_experts_per_tok", 200, "num_experts_per_tok 200 is above num_experts"),
        ("llada2_moe", "score_function", "softmax", "score_function='softmax'"),
        ("llada2_moe", "norm_topk_prob", False, "norm_topk_prob=False"),
        ("llada2_moe", "n_group", 7, "n_group 7, topk_group 4: expected equal groups"),
        ("llada2_moe", "num_experts_per_tok", 129, "above the 32 experts of 4 groups"),
        ("llada2_moe", "num_shared_experts", 0, "num_shared_experts is 0"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, key: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(released(family) | {key: value})


def test_plain_rope_of_newer_transformers_is_read() -> None:
    raw = released("sdar")
    theta = raw.pop("rope_theta")
    new = {"rope_type": "default", "rope_theta": theta}
    assert read(raw | {"rope_parameters": new}) == read(raw | {"rope_theta": theta})


def test_llada_moe_is_named() -> None:
    raw = released("llada") | {"architectures": ["LLaDAMoEModelLM"]}
    with pytest.raises(ValueError, match=r"architectures \['LLaDAMoEModelLM'\], and of model_typ"):
        read(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_any_name_are_read_by_the_index(family: str, tmp_path: Path) -> None:
    model = small_model(family, dtype=torch.float32)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):  # as SDAR-30B-A3B's files are called
        names = sorted(tensors)[i::3]
        file = f"layer-{i}-ep-0-of-1.safetensors"
        save_file({name: tensors[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = load_denoiser(tmp_path).model
    ids = random_ids(2, 9)
    assert torch.equal(again(ids), model(ids))
    save_model(again, tmp_path / "second", max_shard_bytes=4000)
    assert torch.equal(load_denoiser(tmp_path / "second").model(ids), model(ids))


def test_a_router_bias_stays_in_float32_on_disk_and_in_memory(tmp_path: Path) -> None:
    model = small_model("llada2_moe", dtype=torch.float32)
    save_model(model, tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.1.mlp.gate.expert_bias"
    assert {n for n, t in stored.items() if t.dtype == torch.float32} == {bias}
    assert torch.equal(stored[bias], model.state_dict()[bias])
    rough = load_denoiser(tmp_path, dtype=torch.bfloat16).model.state_dict()
    assert rough[bias].dtype == torch.float32 and torch.equal(rough[bias], stored[bias])


def without_ids(family: str, folder: Path) -> None:
    """A checkpoint whose config.json says as little as LLaDA2's."""
    save_model(small_model(family, dtype=torch.float32), folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in IDS - {"pad_token_id"}})
    )


def test_a_model_without_ids_loads_with_them_and_is_saved_with_them(tmp_path: Path) -> None:
    without_ids("llada2_moe", tmp_path)
    with pytest.raises(ValueError, match=r"mask_token_id 156895 is not in 0..29; model.mask_id"):
        u.load_denoiser(tmp_path)
    den = u.load_denoiser(tmp_path, mask_id=27, eos_id=28, block_length=5)
    assert (den.mask_id, den.eos_id, den.pad_id, den.block_length) == (27, 28, 28, 5)
    u.save_model(den.model, tmp_path / "saved")
    again = u.load_denoiser(tmp_path / "saved")
    assert (again.mask_id, again.eos_id, again.block_length) == (27, 28, 5)


def chat_model(family: str, folder: Path) -> None:
    """A tiny model with the byte tokenizer, and a config.json without mask, EOS and block."""
    build_byte_tokenizer(folder)
    t = load_tokenizer(folder)
    config: Any = SHIPPED[family].config(released(family), "released").tiny()
    config = config.with_vocabulary(len(t), t.mask_token_id, t.eos_token_id, t.pad_token_id)
    save_model(SHIPPED[family].build(config).init_weights(seeded()), folder)
    raw = {k: v for k, v in config.to_dict().items() if k not in IDS}
    (folder / "config.json").write_text(json.dumps(raw))


def test_load_takes_them_too(tmp_path: Path) -> None:
    chat_model("llada2_moe", tmp_path)
    with pytest.raises(ValueError, match=r"model\.mask_id"):
        u.load(tmp_path, device="cpu")
    model = u.load(tmp_path, device="cpu", mask_id=0, eos_id=1, block_length=8)
    den = model.denoiser
    assert (den.mask_id, den.eos_id, den.pad_id, den.block_length) == (0, 1, 1, 8)
    assert den.end_ids == (1, 2)
    assert "LLaDA2" in repr(model)


@pytest.mark.parametrize(
    ("template", "answer_ends"),
    [
        (
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
            "'<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
            "<|im_end|>",
        ),
        (
            "{% for m in messages %}{{ '<role>' + ('HUMAN' if m['role'] == 'user' else "
            "'ASSISTANT') + '</role>' + m['content'] + '<|role_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}",
            "<|role_end|>",
        ),
    ],
    ids=["sdar", "llada2"],
)
def test_answers_end_where_the_families_templates_say(
    template: str, answer_ends: str, tmp_path: Path
) -> None:
    build_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", answer_ends]})
    tokenizer.chat_template = template
    assert end_of_turn_ids(tokenizer) == (tokenizer.convert_tokens_to_ids(answer_ends),)


@pytest.mark.parametrize("hub_id", ["JetLM/SDAR-30B-A3B-Chat", "inclusionAI/LLaDA2.0-mini"])
def test_a_stand_in_is_of_its_family(hub_id: str) -> None:
    model = random_tiny(hub_id, seeded())
    assert len(model.blocks) == 2 and model.config.n_experts == 8
    assert model.block_length == {"J": 4, "i": 32}[hub_id[0]]
    assert random_tiny(hub_id, seeded(), given=Given(block_length=2)).block_length == 2
    assert sum(p.numel() for p in model.parameters()) < 300_000


@pytest.mark.parametrize("family", ["sdar", "sdar_moe"])
def test_layers_are_those_of_qwen3(family: str) -> None:
    """transformers' own module under the same weights and a mask of ours."""
    transformers = pytest.importorskip("transformers")
    model = small_model(family, dtype=torch.float32)
    raw = model.config.to_dict()
    names = ("Qwen3Config", "Qwen3ForCausalLM")
    if family == "sdar_moe":
        names = ("Qwen3MoeConfig", "Qwen3MoeForCausalLM")
    makes_config, makes_model = (getattr(transformers, name) for name in names)
    settings = {k: v for k, v in raw.items() if k not in ("architectures", "model_type")}
    with torch.random.fork_rng():
        theirs = makes_model(makes_config(**settings, attn_implementation="sdpa"))
    state = model.state_dict()
    if family == "sdar_moe":  # stacked in memory there
        for i in range(2):
            at = f"model.layers.{i}.mlp.experts."
            parts = {
                kind: torch.stack([state.pop(f"{at}{e}.{kind}_proj.weight") for e in range(6)])
                for kind in ("gate", "up", "down")
            }
            state[f"{at}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
            state[f"{at}down_proj"] = parts["down"]
    theirs.load_state_dict(state)
    ids = random_ids(3, 11)
    mask = torch.ones_like(ids, dtype=torch.bool)
    positions = block_positions(mask)
    visible = block_visible(positions // 4, positions // 4, mask)[:, None]
    with torch.no_grad():
        want = theirs.eval()(ids, attention_mask=visible, position_ids=positions).logits
        got = model(ids)
    assert same_maths(got, want)
    assert want.abs().max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_ones_own_reads_back(family: str) -> None:
    config = small_model(family).config
    assert type(config).from_dict(config.to_dict()) == config
    tied = replace(config, weight_tying=True)
    assert "lm_head.weight" not in SHIPPED[family].build(tied).state_dict()
