"""Adapter, run and checkpoint folders as MODEL: an adapter on its base computes what the merged
weights compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from unmaskrl.evaluation.item_log import described_model
from unmaskrl.models.adapters import add_lora, merged_tensors, save_adapter
from unmaskrl.models.checkpoint import load_denoiser, save_model
from unmaskrl.models.hub import ASSETS, asset, checkpoint_folder
from unmaskrl.models.loading import open_checkpoint
from unmaskrl.models.weights import trainable
from unmaskrl.recipes.cost import model_config
from unmaskrl.recipes.schema import LoRAConfig

IDS = torch.arange(24).reshape(2, 12)
LORA = LoRAConfig(rank=2, alpha=6.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of mini in adapter/, the merged weights in merged/."""
    denoiser = load_denoiser(asset("mini"))
    add_lora(
        denoiser.model,
        torch.Generator().manual_seed(1),
        rank=LORA.rank,
        alpha=LORA.alpha,
        targets=LORA.targets,
    )
    for parameter in trainable(denoiser.model).values():
        with torch.no_grad():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    save_adapter(denoiser.model, tmp_path / "adapter", "mini", rank=LORA.rank, alpha=LORA.alpha)
    save_model(denoiser.model, tmp_path / "merged", tensors=merged_tensors(denoiser.model))
    return tmp_path / "adapter"


def change(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_an_adapter_on_its_base_is_the_merged_model(folder: Path) -> None:
    denoiser, tokenizer, source = open_checkpoint(folder)
    ours = denoiser.model.state_dict()
    merged = load_denoiser(folder.parent / "merged").model.state_dict()
    assert ours.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max())
        )
    moved = (denoiser.logits(IDS) - load_denoiser(asset("mini")).logits(IDS)).abs().max()
    assert moved > 0.1 and tokenizer.mask_token_id == denoiser.mask_id
    assert source == Path(asset("mini")), "the adapter has no tokenizer of its own"
    assert model_config(str(folder)) == model_config("mini")
    with pytest.raises(ValueError, match=r"is an adapter: unmaskrl.models.loading.open_checkpoint"):
        load_denoiser(folder)


def test_another_base_is_another_model_to_an_evaluation(folder: Path) -> None:
    before = described_model(str(folder))
    change(folder, base_model_name_or_path="zero")
    assert described_model(str(folder))["weights"] != before["weights"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"base_model_name_or_path": "/nowhere/llada"},
            "adapter of /nowhere/llada, which cannot be loaded: .*not a folder",
        ),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"use_dora": True}, "use_dora=True is not supported; merge it by peft first"),
        ({"modules_to_save": ["wte"]}, "modules_to_save=.* is not supported"),
        ({"r": 0}, "expected numbers r and lora_alpha, got 0"),
    ],
)
def test_adapters_that_cannot_be_put_on(
    folder: Path, settings: dict[str, object], said: str
) -> None:
    change(folder, **settings)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(folder)


def test_an_adapter_of_another_shape_is_refused_by_layer(folder: Path, tmp_path: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cannot be read .*save or download the adapter again"):
        open_checkpoint(folder)


def test_rslora_scales_by_the_root_of_the_rank(folder: Path) -> None:
    plain = open_checkpoint(folder)[0].model.state_dict()
    change(folder, use_rslora=True)
    base = load_denoiser(asset("mini")).model.state_dict()
    scaled = open_checkpoint(folder)[0].model.state_dict()
    name = next(n for n in base if not base[n].equal(plain[n]))
    torch.testing.assert_close(
        scaled[name] - base[name], (plain[name] - base[name]) * 2**0.5, rtol=1e-3, atol=1e-6
    )


def test_a_run_is_its_model_and_a_checkpoint_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "update-000004").mkdir(parents=True)
    (run / "config.yaml").write_text("name: x\n")
    with pytest.raises(ValueError, match=r"a run that has not come to its end.*--resume"):
        checkpoint_folder(run)
    shutil.copytree(ASSETS / "mini", run / "model")
    assert checkpoint_folder(run) == run / "model"
    (run / "config.json").write_text("{}")  # what sft keeps its recipe in
    assert checkpoint_folder(run) == run / "model"
    (run / "checkpoints" / "update-000004" / "state.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"is a checkpoint, for --resume alone; give .* a finished run, .*/run/model",
    ):
        checkpoint_folder(run / "checkpoints" / "update-000004")
    assert checkpoint_folder(ASSETS / "mini") == ASSETS / "mini"
