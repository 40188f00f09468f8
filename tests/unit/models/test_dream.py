"""The Dream architecture against the reference's logits and the written-out formula, its shift, and
what is refused.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import same_maths, seeded
from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.families import Dream, DreamConfig, MaskPredictor

DATA = Path(__file__).parents[2] / "data" / "dream-tiny"

SMALL = DreamConfig(
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    mlp_hidden_size=48,
    vocab_size=24,
    mask_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    rope_theta=10000.0,
)


def small_model(seed: int = 0, **changes) -> Dream:
    """fp64, weights large enough that attention is far from uniform, biases not zero."""
    model = (
        Dream(dataclasses.replace(SMALL, **changes)).init_weights(seeded(seed), std=0.3).double()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64) / 4
                )
    return model


def random_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (rows, length), generator=seeded(seed))


def left_mask(pads: list[int], length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor(pads)[:, None]


def test_logits_are_the_references_one_row_on() -> None:
    expected = load_file(DATA / "expected.safetensors")
    denoiser = load_denoiser(DATA)
    with torch.no_grad():
        logits = denoiser.logits(expected["input_ids"])
    ours = logits[..., expected["columns"]]
    columns = expected["logits"]
    assert same_maths(ours[:, 1:], columns[:, :-1])
    assert same_maths(logits.logsumexp(-1)[:, 1:], expected["logits_logsumexp"][:, :-1])
    assert same_maths(ours[:, 0], columns[:, 0])  # the first row stands twice, as in the reference


def test_masked_logits_are_the_references_one_row_on() -> None:
    expected = load_file(DATA / "expected.safetensors")
    denoiser = load_denoiser(DATA)
    mask = expected["attention_mask"].bool()
    assert not mask[0, :5].any() and mask[0, 5:].all() and mask[1:].all()
    with torch.no_grad():
        logits = denoiser.logits(expected["input_ids"], mask)
    both = mask[:, 1:] & mask[:, :-1]  # rows whose raw row is no pad
    ours = logits[..., expected["columns"]]
    assert same_maths(ours[:, 1:][both], expected["logits_masked"][:, :-1][both])
    assert same_maths(
        logits.logsumexp(-1)[:, 1:][both], expected["logits_masked_logsumexp"][:, :-1][both]
    )
    assert same_maths(ours[0, 5], expected["logits_masked"][0, 5])
    assert logits.isfinite().all()


def test_positions_of_the_fixture_count_from_the_first_real_token() -> None:
    # Ours are columns: rotary attention sees differences only, so both give the same logits
    # (above).
    expected = load_file(DATA / "expected.safetensors")
    assert expected["position_ids"][0, 5:].tolist() == list(range(35))


def by_formula(model: Dream, ids: Tensor) -> Tensor:
    """Raw logits of one row, written out position by position and head by head."""
    weights = model.state_dict()
    c = model.config
    half = c.head_dim // 2

    def norm(x: Tensor, name: str) -> Tensor:
        return (
            x
            / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()
            * weights[f"{name}.weight"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def rope(x: Tensor, position: int) -> Tensor:
        out = torch.empty_like(x)
        for i in range(half):
            angle = position * c.rope_theta ** (-2 * i / c.head_dim)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    x = weights["model.embed_tokens.weight"][ids]
    length = len(ids)
    for layer in range(c.n_layers):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm")
        q, k, v = (linear(y, f"{at}self_attn.{n}_proj").view(length, -1, c.head_dim) for n in "qkv")
        heads = []
        for head in range(c.n_heads):
            shared = head // (c.n_heads // c.n_kv_heads)
            qs = torch.stack([rope(q[i, head], i) for i in range(length)])
            ks = torch.stack([rope(k[i, shared], i) for i in range(length)])
            heads.append((qs @ ks.T / math.sqrt(c.head_dim)).softmax(-1) @ v[:, shared])
        x = x + linear(torch.cat(heads, -1), at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        gate = linear(y, at + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(y, at + "mlp.up_proj"), at + "mlp.down_proj")
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


def test_equals_the_written_out_formula_in_fp64() -> None:
    model = small_model()
    ids = random_ids(2, 9)
    with torch.no_grad():
        logits = model(ids)
        raw = by_formula(model, ids[1])
    assert same_maths(logits[1], raw[[0, *range(8)]])
    assert (logits[1] - raw).abs().max() > 0.1


def test_left_pads_change_nothing_in_fp64() -> None:
    model = small_model()
    ids = random_ids(3, 12)
    pads = torch.randint(0, SMALL.vocab_size, (3, 5), generator=seeded(2))
    with torch.no_grad():
        alone = model(ids)
        padded = model(torch.cat([pads, ids], 1), left_mask([5, 5, 5], 17))
    assert same_maths(padded[:, 5:], alone)  # the first real row too
    assert padded.isfinite().all()


def test_an_all_true_mask_is_no_mask() -> None:
    model = small_model()
    ids = random_ids(3, 12)
    with torch.no_grad():
        assert same_maths(model(ids, torch.ones_like(ids, dtype=torch.bool)), model(ids))


def test_a_row_of_pads_only_is_finite() -> None:
    model = small_model()
    ids = random_ids(2, 6)
    logits = model(ids, left_mask([6, 0], 6))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_rows_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    ids = random_ids(7, 10)
    mask = left_mask(list(range(7)), 10)
    with torch.no_grad():
        together = model(ids, mask)
        rows = torch.cat([model(ids[i : i + 1], mask[i : i + 1]) for i in range(7)])
        monkeypatch.setattr(MaskPredictor, "cpu_chunk", 20)
        chunked = model(ids, mask)
    assert same_maths(rows, together)
    assert same_maths(chunked, together)


def test_no_token_is_seen_by_a_causal_mask() -> None:
    model = small_model()
    ids = random_ids(1, 8)
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % SMALL.vocab_size
    with torch.no_grad():
        assert (model(ids) - model(other))[0, 1].abs().max() > 1e-3


def test_bfloat16_is_close() -> None:
    expected = load_file(DATA / "expected.safetensors")
    exact = load_denoiser(DATA)
    rough = load_denoiser(DATA, dtype=torch.bfloat16)
    mask = expected["attention_mask"].bool()
    with torch.no_grad():
        a, b = (d.logits(expected["input_ids"], mask)[mask] for d in (exact, rough))
    assert b.dtype == torch.bfloat16
    assert (b.float() - a).norm() / a.norm() < 0.02


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(
        ValueError, match="got 9 positions, the model has max_position_embeddings 8"
    ):
        small_model(max_sequence_length=8).hidden(random_ids(1, 9))


def test_init_scales_and_generator() -> None:
    config = dataclasses.replace(SMALL, d_model=256, mlp_hidden_size=512, n_layers=8)
    first, second, other = (Dream(config).init_weights(seeded(s)).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    layer = "model.layers.3."
    assert first[layer + "self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert first[layer + "self_attn.o_proj.weight"].std().item() == pytest.approx(
        0.02 / 4, rel=0.02
    )
    assert first[layer + "mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert bool((first[layer + "input_layernorm.weight"] == 1).all())
    assert bool((first[layer + "self_attn.k_proj.bias"] == 0).all())


def test_a_tied_model_has_no_second_head(tmp_path: Path) -> None:
    model = small_model(weight_tying=True)
    assert "lm_head.weight" not in model.state_dict()
    hidden = torch.randn(3, SMALL.d_model, generator=seeded(5), dtype=torch.float64)
    expected = hidden @ model.state_dict()["model.embed_tokens.weight"].T
    assert same_maths(model.head(hidden), expected)
    save_model(model, tmp_path)
    assert torch.equal(
        load_denoiser(tmp_path, dtype=torch.float64).head(hidden), model.head(hidden)
    )


def test_save_load_save_gives_equal_files(tmp_path: Path) -> None:
    first = load_denoiser(DATA)
    save_model(first.model, tmp_path / "a")
    save_model(load_denoiser(tmp_path / "a").model, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == published()
    original = load_file(DATA / "model.safetensors")
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)


def published() -> dict:
    return json.loads((DATA / "config.json").read_text())


def test_config_keeps_what_it_read_and_changes_win() -> None:
    raw = published() | {"some_future_key": [1, 2]}
    config = DreamConfig.from_dict(raw)
    assert config.to_dict() == raw
    changed = dataclasses.replace(config, mask_token_id=3)
    saved = changed.to_dict()
    assert {key: saved[key] for key in raw} == raw | {"mask_token_id": 3}
    assert DreamConfig.from_dict(changed.to_dict()) == changed


def test_config_of_a_new_model_reads_back() -> None:
    raw = SMALL.to_dict()
    assert raw["model_type"] == "Dream" and raw["hidden_act"] == "silu"
    assert DreamConfig.from_dict(raw) == SMALL


def test_absent_keys_mean_what_the_published_class_fills_in() -> None:
    raw = published() | {"num_key_value_heads": None, "pad_token_id": None}
    config = DreamConfig.from_dict(raw)
    assert config.n_kv_heads == config.n_heads
    assert config.pad_token_id == config.eos_token_id


def test_plain_rope_parameters_of_newer_transformers_are_read() -> None:
    """transformers 5 saves rope_theta in there; any other kind of rope is refused (below)."""
    raw = published()
    theta = raw.pop("rope_theta")
    newer = DreamConfig.from_dict(
        raw | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    )
    assert (
        newer == DreamConfig.from_dict(raw | {"rope_theta": theta})
        and newer.to_dict()["rope_theta"] == theta
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 5.0}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_theta": 5.0}),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("attention_dropout", 0.1),
    ],
)
def test_unsupported_settings_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"Dream config has {key}=.*; only .* is supported"):
        DreamConfig.from_dict(published() | {key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"hidden_size": "64"}, "hidden_size='64'; expected int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected at least 1"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "hidden_size 64 / num_attention_heads 5",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads 4 must be a multiple of num_key_value_heads 3",
        ),
        ({"head_dim": 32}, "head_dim=32; only 16 is supported"),
        ({"mask_token_id": 512}, "mask_token_id 512 is not in 0..511"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamConfig.from_dict(published() | change)
