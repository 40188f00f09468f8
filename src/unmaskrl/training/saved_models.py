"""The models that a run leaves: weights, adapters, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from ..evaluation.decode_settings import DECODE_FILE
from ..models.adapters import merged_tensors, save_adapter
from ..models.checkpoint import save_model
from ..models.heads import save_threshold
from ..models.weights import swapped
from ..recipes.memory import size_text
from ..recipes.schema import DecodeConfig, Recipe, SFTRecipe
from ..utils.files import write_json
from .bad_updates import check_weights
from .folder.card import figures_of, write_card
from .state import Run, Training


def save_models(run: Training, decode: Mapping[str, DecodeConfig]) -> None:
    """The averaged weights in ``model/`` and the raw ones in ``model-raw/``; without an average one
    folder, ``model/``.

    Each can be loaded. With adapters it holds what ``run.save`` says: the adapter on the name of
    its base, the merged weights, or both (the adapter then in ``adapter/``). Beside the weights:
    tokenizer, threshold head, ``decode`` settings by task, and a card.
    """
    check_weights(run)
    model = run.denoiser.model
    main = run.accelerator.is_main_process
    lora = run.recipe.model.lora
    kind = saved_kind(run.recipe)
    for name in ("model", "model-raw") if run.average else ("model",):
        with averaged(run, name == "model"):
            if kind != "adapter":
                # written inside: tensors that are neither split nor merged are the model's own
                tensors = merged_tensors(model, keep=main)
                if main:
                    save_model(model, run.out / name, tensors=tensors)
            if lora and kind != "merged":
                folder = run.out / name if kind == "adapter" else run.out / name / "adapter"
                save_adapter(
                    model,
                    folder,
                    run.recipe.model.path,
                    rank=lora.rank,
                    alpha=lora.alpha,
                    revision=run.recipe.model.revision,
                    write=main,
                )
        if main:
            folder = run.out / name
            run.write_tokenizer(folder)
            if isinstance(run, Run) and run.sampler is not None:
                save_threshold(run.sampler.head, folder)
            settings = {task: chosen.model_dump() for task, chosen in decode.items()}
            write_json(folder / DECODE_FILE, settings)
            weights = "ema" if run.average and name == "model" else "raw"
            write_card(folder, run.recipe, run.step, weights, figures_of(run.out, weights))


def saved_kind(recipe: Recipe | SFTRecipe) -> str:
    """adapter, merged or both: merged without adapters, and also for a random stand-in, whose base
    is nowhere to be loaded.
    """
    if recipe.model.lora is None:
        return "merged"
    if recipe.run.save == "adapter" and recipe.model.random_init is not None:
        return "both"
    return recipe.run.save


def saving_notes(run: Training) -> list[str]:
    """With adapters: what model/ will hold at the end, and how large it is."""
    if run.recipe.model.lora is None:
        return []
    parameters = dict(run.denoiser.model.named_parameters())
    adapter = sum(p.numel() * p.element_size() for p in parameters.values() if p.requires_grad)
    base = sum(p.numel() * p.element_size() for p in parameters.values() if not p.requires_grad)
    kind = saved_kind(run.recipe)
    # 4 bits are written out as whole numbers
    least = " at least" if run.recipe.model.quantize else ""
    whole = f"the merged weights, {size_text(base)}{least}"
    parts = {"adapter": [f"the adapter, {size_text(adapter)}"], "merged": [whole]}
    held = parts.get(kind) or parts["merged"] + parts["adapter"]
    return [f"run.save={kind}: model/ will hold {' and '.join(held)}"]


def averaged(run: Training, wanted: bool) -> AbstractContextManager[None]:
    """The run's model with the averaged weights in it, if there are such."""
    return swapped(run.denoiser.model, run.average) if wanted and run.average else nullcontext()
