"""The LLaDA architecture against the reference's logits and the written-out formula, and its
invariances.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import same_maths
from unmaskrl.models.checkpoint import load_denoiser
from unmaskrl.models.families import LLaDA, LLaDAConfig, MaskPredictor

DATA = Path(__file__).parents[2] / "data" / "llada-tiny"
GQA = Path(__file__).parents[4] / "shared" / "parity" / "llada-tiny-gqa-bias"

SMALL = LLaDAConfig(
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    mlp_hidden_size=48,
    vocab_size=19,
    embedding_size=24,
    mask_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    include_qkv_bias=True,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(seed: int = 0, **changes) -> LLaDA:
    """fp64, weights large enough that attention is far from uniform, biases not zero."""
    model = (
        LLaDA(dataclasses.replace(SMALL, **changes)).init_weights(seeded(seed), std=0.3).double()
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


def test_logits_match_the_reference() -> None:
    expected = load_file(DATA / "expected.safetensors")
    denoiser = load_denoiser(DATA)
    with torch.no_grad():
        logits = denoiser.logits(expected["input_ids"])
    columns = expected["columns"]
    assert same_maths(logits[..., columns], expected["logits"])
    assert same_maths(logits.logsumexp(-1), expected["logits_logsumexp"])


def test_masked_logits_match_the_reference() -> None:
    expected = load_file(DATA / "expected.safetensors")
    denoiser = load_denoiser(DATA)
    mask = expected["attention_mask"].bool()
    assert not mask.all()
    with torch.no_grad():
        logits = denoiser.logits(expected["input_ids"], mask)
    columns = expected["columns"]
    assert same_maths(logits[..., columns][mask], expected["logits_masked"][mask])
    assert same_maths(logits.logsumexp(-1)[mask], expected["logits_masked_logsumexp"][mask])


@pytest.mark.skipif(not GQA.is_dir(), reason="the shared parity fixtures are not here")
def test_gqa_bias_and_tied_head_match_the_reference() -> None:
    expected = load_file(GQA / "expected.safetensors")
    denoiser = load_denoiser(GQA)
    mask = expected["attention_mask"].bool()
    with torch.no_grad():
        plain = denoiser.logits(expected["input_ids"])
        masked = denoiser.logits(expected["input_ids"], mask)
    assert same_maths(plain, expected["logits"])
    assert same_maths(masked[mask], expected["logits_masked"][mask])


def by_formula(model: LLaDA, ids: Tensor) -> Tensor:
    """Logits of one row, written out position by position and head by head."""
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
            a = x[i]
            b = x[i + half]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = weights["model.transformer.wte.weight"][ids]
    length = len(ids)
    for layer in range(c.n_layers):
        at = f"model.transformer.blocks.{layer}."
        y = norm(x, at + "attn_norm")
        q, k, v = (
            linear(y, at + n).view(length, -1, c.head_dim) for n in ("q_proj", "k_proj", "v_proj")
        )
        heads = []
        for head in range(c.n_heads):
            shared = head // (c.n_heads // c.n_kv_heads)
            qs = torch.stack([rope(q[i, head], i) for i in range(length)])
            ks = torch.stack([rope(k[i, shared], i) for i in range(length)])
            heads.append((qs @ ks.T / math.sqrt(c.head_dim)).softmax(-1) @ v[:, shared])
        x = x + linear(torch.cat(heads, -1), at + "attn_out")
        y = norm(x, at + "ff_norm")
        gate = linear(y, at + "ff_proj")
        x = x + linear(gate * gate.sigmoid() * linear(y, at + "up_proj"), at + "ff_out")
    return norm(x, "model.transformer.ln_f") @ weights["model.transformer.ff_out.weight"].T


def test_equals_the_written_out_formula_in_fp64() -> None:
    model = small_model()
    ids = random_ids(2, 9)
    with torch.no_grad():
        logits = model(ids)
        assert same_maths(logits[1], by_formula(model, ids[1]))
    assert logits.shape == (2, 9, SMALL.embedding_size)


def test_left_pads_change_nothing_in_fp64() -> None:
    model = small_model()
    ids = random_ids(3, 12)
    pads = torch.randint(0, SMALL.vocab_size, (3, 5), generator=seeded(2))
    mask = torch.cat([torch.zeros(3, 5, dtype=torch.bool), torch.ones(3, 12, dtype=torch.bool)], 1)
    with torch.no_grad():
        alone = model(ids)
        padded = model(torch.cat([pads, ids], 1), mask)
    assert same_maths(padded[:, 5:], alone)
    assert padded.isfinite().all()


def test_an_all_true_mask_is_no_mask() -> None:
    model = small_model()
    ids = random_ids(3, 12)
    with torch.no_grad():
        assert same_maths(model(ids, torch.ones_like(ids, dtype=torch.bool)), model(ids))


def test_a_row_of_pads_only_is_finite() -> None:
    model = small_model()
    ids = random_ids(2, 6)
    mask = torch.tensor([[False] * 6, [True] * 6])
    logits = model(ids, mask)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_rows_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    ids = random_ids(7, 10)
    mask = torch.arange(10) >= torch.arange(7)[:, None]
    with torch.no_grad():
        together = model(ids, mask)
        rows = torch.cat([model(ids[i : i + 1], mask[i : i + 1]) for i in range(7)])
        monkeypatch.setattr(
            MaskPredictor, "cpu_chunk", 20
        )  # two rows at a time, the last chunk has one
        chunked = model(ids, mask)
    assert same_maths(rows, together)
    assert same_maths(chunked, together)


def test_gradients_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(5, 8)
    gradients = []
    for chunk in (2048, 16):
        monkeypatch.setattr(MaskPredictor, "cpu_chunk", chunk)
        model = small_model()
        model(ids).log_softmax(-1).pow(2).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    largest = max(float(a.abs().max()) for a in gradients[0])
    assert all(same_maths(b, a, size=largest) for a, b in zip(*gradients, strict=True))


def test_an_empty_batch_gives_empty_logits() -> None:
    assert small_model()(random_ids(0, 8)).shape == (0, 8, SMALL.embedding_size)


def test_attention_looks_both_ways() -> None:
    model = small_model()
    ids = random_ids(1, 8)
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % SMALL.vocab_size
    with torch.no_grad():
        assert (model(ids) - model(other))[0, 0].abs().max() > 1e-3


def test_training_works_after_inference_mode() -> None:
    model = small_model()
    ids = random_ids(2, 31)
    with torch.inference_mode():
        model(ids)  # must not leave inference tensors in the table of angles
    model(ids).sum().backward()


def test_bfloat16_is_close() -> None:
    model = small_model().float()
    ids = random_ids(2, 12)
    with torch.no_grad():
        exact = model(ids)
        rough = model.to(torch.bfloat16)(ids)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="got 9 positions, the model has max_sequence_length 8"):
        small_model(max_sequence_length=8).hidden(random_ids(1, 9))


def test_init_uses_the_generator_only() -> None:
    before = torch.get_rng_state()
    first, second, other = (LLaDA(SMALL).init_weights(seeded(s)).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["model.transformer.wte.weight"], other["model.transformer.wte.weight"]
    )


def test_init_scales() -> None:
    config = dataclasses.replace(SMALL, d_model=256, mlp_hidden_size=512, n_layers=8)
    state = LLaDA(config).init_weights(seeded(0)).state_dict()
    block = "model.transformer.blocks.3."
    assert state[block + "q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state[block + "attn_out.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert state[block + "ff_out.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert state["model.transformer.ff_out.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((state[block + "ff_norm.weight"] == 1).all()) and bool(
        (state[block + "q_proj.bias"] == 0).all()
    )


def test_a_new_model_refuses_to_run_without_weights() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        LLaDA(SMALL)(random_ids(1, 4)).sum().item()


def test_a_tied_model_has_no_second_head() -> None:
    model = small_model(weight_tying=True)
    assert "model.transformer.ff_out.weight" not in model.state_dict()
    hidden = torch.randn(3, SMALL.d_model, generator=seeded(5), dtype=torch.float64)
    expected = hidden @ model.state_dict()["model.transformer.wte.weight"].T
    assert same_maths(model.head(hidden), expected)


def published() -> dict:
    return json.loads((DATA / "config.json").read_text())


def test_config_keeps_what_it_read() -> None:
    raw = published() | {"some_future_key": [1, 2]}
    assert LLaDAConfig.from_dict(raw).to_dict() == raw


def test_config_changes_win_over_what_was_read() -> None:
    config = dataclasses.replace(LLaDAConfig.from_dict(published()), mask_token_id=3)
    saved = config.to_dict()
    assert saved["mask_token_id"] == 3 and saved["init_fn"] == "mitchell"
    assert LLaDAConfig.from_dict(saved) == config


def test_config_of_a_new_model_reads_back() -> None:
    raw = SMALL.to_dict()
    assert raw["model_type"] == "llada" and raw["rope"] is True
    assert LLaDAConfig.from_dict(raw) == SMALL


def test_absent_keys_mean_what_the_published_class_fills_in() -> None:
    nulls = {
        "n_kv_heads": None,
        "mlp_hidden_size": None,
        "embedding_size": None,
        "pad_token_id": None,
    }
    config = LLaDAConfig.from_dict(published() | nulls)
    assert (config.n_kv_heads, config.mlp_hidden_size) == (config.n_heads, 4 * config.d_model)
    assert (config.embedding_size, config.pad_token_id) == (config.vocab_size, config.eos_token_id)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("layer_norm_type", "default"),
        ("input_emb_norm", True),
        ("attention_layer_norm", True),
        ("scale_logits", True),
        ("block_group_size", 2),
        ("activation_type", "swiglu"),
        ("rope", False),
        ("clip_qkv", 8.0),
        ("multi_query_attention", True),
        ("block_type", "sequential"),
        ("residual_dropout", 0.1),
        ("rope_full_precision", False),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_unsupported_settings_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"LLaDA config has {key}=.*; only .* is supported"):
        LLaDAConfig.from_dict(published() | {key: value})


@pytest.mark.parametrize("key", ["rope", "activation_type", "layer_norm_type", "block_type"])
def test_settings_whose_default_differs_must_be_present(key: str) -> None:
    raw = published()
    del raw[key]
    with pytest.raises(ValueError, match=f"{key}=None"):
        LLaDAConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"d_model": "64"}, "d_model='64'; expected int"),
        ({"n_layers": True}, "n_layers=True; expected int"),
        ({"n_layers": 0}, "n_layers is 0; expected at least 1"),
        ({"n_heads": 5, "n_kv_heads": 5}, "d_model 64 / n_heads 5"),
        ({"n_kv_heads": 3}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"embedding_size": 500}, "embedding_size 500 is below vocab_size 512"),
        ({"mask_token_id": 512}, "mask_token_id 512 is not in 0..511"),
        ({"include_bias": True, "bias_for_layer_norm": None}, "include_bias and norms with a bias"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(published() | change)
