"""A run from its recipe: model, task, estimator, loss, optimiser, folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from ..core.rng import named_generator
from ..models.adapters import WithoutAdapters, add_lora, quantize_blocks
from ..models.compiled import compile_blocks, no_compiler
from ..models.denoiser import ModelDenoiser
from ..models.families import named_family
from ..models.hub import asset
from ..models.loading import open_checkpoint, random_tiny, stand_in_folder, with_end_ids
from ..models.probe import check_probe, masked_accuracy
from ..models.tokenizer import byte_tokenizer, encode_reference, load_tokenizer
from ..models.weights import frozen_copy, start_average, trainable
from ..recipes.checks import check_blocks
from ..recipes.cost import model_grid
from ..recipes.optimizers import make_optimizer
from ..recipes.registry import build_method, make_task
from ..recipes.schema import BaseModelConfig, Recipe, SFTRecipe
from ..tasks import TrainerState, TrlReward, named_rewards
from ..utils.files import read_json, write_json
from ..utils.torch_setup import DTYPES, set_threads
from .folder.config import check_changes, describe_changes, read_config, write_config
from .folder.run_folder import CONFIG, check_folder, claim_folder, folder_of, hold_folder
from .ranks.shard import Gathered, Lockstep, shard_blocks
from .rollouts.anchors import Anchors
from .rollouts.problems import Problems
from .rollouts.reward_trial import try_rewards
from .rollouts.threshold_policy import Sampler
from .state import Run, Training
from .trackers import check_trackers

PROBE_PROBLEMS = 32
# of ranks while one evaluates or saves; a rank that dies is noticed by the launcher, not by this
WAIT = timedelta(days=1)
T = TypeVar("T", bound=Training)


def begin(
    recipe: Recipe | SFTRecipe,
    build: Callable[[Accelerator, Path], T],
    *,
    resume: bool,
    force: bool,
) -> T:
    """Build a run from its recipe; only when all of it could be built is its folder made (by
    ``force``: the old one moved).

    The main process holds the folder's lock when this returns (``Training.lock``).
    """
    check_trackers(recipe.run.log_with)
    patience = InitProcessGroupKwargs(timeout=WAIT)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    out = folder_of(recipe.run.out, recipe.name, recipe.run.seed)
    lock = None
    accelerator.project_configuration = ProjectConfiguration(
        project_dir=str(out), logging_dir=str(out / "tensorboard")
    )
    if accelerator.is_main_process:  # the other ranks may look when the folder is already there
        check_folder(out, resume=resume, force=force)
        lock = hold_folder(out) if resume else None
    try:
        changed, notes = _check_stored(recipe, out) if resume else ([], [])
        run = build(accelerator, out)
        if accelerator.is_main_process and not resume:
            lock, moved = claim_folder(out, force=force)
            notes += moved
            write_config(recipe, out)
        if accelerator.is_main_process:
            _choose_threads(recipe, out)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    run.lock = lock
    run.changed = changed
    run.notes = [*notes, *run.notes]
    accelerator.wait_for_everyone()
    run.threads = _choose_threads(recipe, out)
    return run


def start_run(
    recipe: Recipe, *, resume: bool, force: bool, rewards: Sequence[TrlReward] = ()
) -> Run:
    """A run of RL. ``rewards``: functions beside those that the recipe names."""

    def build(accelerator: Accelerator, out: Path) -> Run:
        return _build_run(recipe, accelerator, out, rewards, resume=resume)

    return begin(recipe, build, resume=resume, force=force)


def checked_shard(
    recipe: Recipe | SFTRecipe, accelerator: Accelerator, rows: dict[str, int]
) -> str:
    """How weights are split over processes. ValueError unless each of ``rows``, by setting, is a
    multiple of their number.
    """
    ranks = accelerator.num_processes
    for name, count in rows.items():
        if count % ranks:
            raise ValueError(
                f"{name}={count} on {ranks} processes: every process takes as many, so set a "
                "multiple of their number"
            )
    return _shard_mode(recipe, accelerator)


def _build_run(
    recipe: Recipe,
    accelerator: Accelerator,
    out: Path,
    rewards: Sequence[TrlReward],
    *,
    resume: bool,
) -> Run:
    rows = {"train.prompts_per_step": recipe.train.prompts_per_step}
    shard = checked_shard(recipe, accelerator, rows)
    method = build_method(recipe)
    check_blocks(recipe, method, model_grid(recipe.model))  # before gigabytes are fetched and read
    denoiser, tokenizer, folder = open_model(recipe.model, accelerator.device, recipe.run.seed)
    check_blocks(recipe, method, denoiser.block_length)  # a family from outside may not say before
    task = make_task(recipe.task)
    problems = Problems(recipe, task, tokenizer, denoiser.max_length)
    named = [*recipe.train.reward_functions, *rewards]
    functions = named_rewards(named, "train.reward_functions")
    state = TrainerState(global_step=0, max_steps=recipe.train.steps)
    tried = try_rewards(
        task, tokenizer, problems.examples[0], functions, state=state, run_name=recipe.name
    )
    notes = [*problems.notes, *tried, *compile_if_set(recipe.model, denoiser)]
    notes += [] if resume else probe_model(recipe, denoiser, problems)
    gathered = (
        Gathered(denoiser.model, frozen_copy(denoiser))
        if shard != "none" and recipe.train.gather_rollout
        else None
    )
    frozen = gathered.plain if gathered else Lockstep.of(denoiser) if shard != "none" else denoiser
    base = denoiser
    # something looks at the model as it was
    if method.loss.uses_ref or "most_predictable" in recipe.prior.select:
        base = (
            WithoutAdapters.of(frozen, inner=frozen) if recipe.model.lora else frozen_copy(denoiser)
        )
    if shard != "none":
        shard_blocks(denoiser.model, shard)
    optimizer = make_optimizer(recipe.optimizer, trainable(denoiser.model).values())
    return Run(
        recipe=recipe,
        out=out,
        accelerator=accelerator,
        denoiser=denoiser,
        frozen=frozen,
        gathered=gathered,
        average=start_average(denoiser.model) if recipe.train.ema else {},
        reference=base if method.loss.uses_ref else None,
        tokenizer=tokenizer,
        tokenizer_folder=folder,
        task=task,
        problems=problems,
        anchors=Anchors(recipe, problems, base),
        method=method,
        functions=functions,
        optimizer=optimizer,
        sampler=Sampler.start(recipe, denoiser, folder),
        notes=notes,
    )


def probe_model(recipe: Recipe, denoiser: ModelDenoiser, problems: Problems) -> list[str]:
    """Ask a loaded model for masked tokens of some training problems; a warning, or ValueError if
    its logits look shifted.
    """
    if not recipe.run.probe or recipe.model.random_init is not None:
        return []
    count = min(PROBE_PROBLEMS, len(problems.examples))
    texts = [problems.task.reference(example) for example in problems.examples[:count]]
    known = [i for i, text in enumerate(texts) if text is not None]
    prompts = [problems.prompt(i) for i in known]
    references = [encode_reference(problems.tokenizer, texts[i] or "", [])[0] for i in known]
    probe = masked_accuracy(
        denoiser, prompts, references, named_generator(recipe.run.seed, "probe")
    )
    note = check_probe(probe)
    return [] if note is None else [f"model.path {recipe.model.path}: {note}"]


def _shard_mode(recipe: Recipe | SFTRecipe, accelerator: Accelerator) -> str:
    """train.shard, or what accelerate's own FSDP settings ask for."""
    mode = recipe.train.shard
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "accelerate is configured for DeepSpeed, whose engine owns the optimiser step that "
            "this loop does itself; "
            "train.shard=zero2 splits the same tensors: launch with configs/accelerate/zero2.yaml"
        )
    if kind == DistributedType.FSDP and mode == "none":
        plugin = accelerator.state.fsdp_plugin
        mode = "fsdp" if plugin is None or plugin.reshard_after_forward else "zero2"
    if mode != "none" and accelerator.num_processes == 1:
        raise ValueError(
            f"train.shard={mode} splits weights over processes and there is one; start with "
            "`accelerate launch`"
        )
    return mode


def _check_stored(recipe: Recipe | SFTRecipe, out: Path) -> tuple[list[str], list[str]]:
    """Changed settings of a run that goes on, and what to say of them; ValueError if one belongs to
    its past.
    """
    stored = read_config(out / CONFIG, type(recipe))
    changed = check_changes(recipe, stored, out / CONFIG)
    return changed, describe_changes(recipe, stored, changed)


def _choose_threads(recipe: Recipe | SFTRecipe, out: Path) -> int:
    """The measured number of threads, kept with the run: a resumed run must sum in the same order,
    unless told otherwise.
    """
    path = out / "threads.json"
    wanted = recipe.run.threads
    if path.exists():
        stored = read_json(path).get("threads")
        if isinstance(stored, bool) or not isinstance(stored, int) or stored < 1:
            raise ValueError(f"{path}: expected a number of threads, got {stored!r}; delete it")
        if wanted in (0, stored):
            return set_threads(stored)
    threads = set_threads(wanted)
    write_json(path, {"threads": threads})
    return threads


def open_model(
    model: BaseModelConfig, device: str | torch.device, seed: int = 0
) -> tuple[ModelDenoiser, Any, Path | None]:
    """What a recipe's ``model`` section says: denoiser, tokenizer, and the tokenizer's folder
    (None: the byte tokenizer).

    Blocks are put into 4 bits, adapters (drawn from ``seed``) are added, and activations are
    recomputed, if so set.
    """
    denoiser, tokenizer, folder = _open_base(model, "cpu" if model.quantize else device)
    module = denoiser.model
    if model.quantize:
        quantize_blocks(module, torch.device(device), DTYPES[model.dtype])
    if model.lora:
        add_lora(
            module,
            named_generator(seed, "lora"),
            rank=model.lora.rank,
            alpha=model.lora.alpha,
            targets=model.lora.targets,
        )
    module.recompute = model.activation_checkpointing
    return denoiser, tokenizer, folder


def compile_if_set(model: BaseModelConfig, denoiser: ModelDenoiser) -> list[str]:
    """Compile the blocks if that is set; a line if it is and they cannot be."""
    device = denoiser.device
    by_itself = device.type == "cuda" and denoiser.model.compiles
    if model.compile == "none" or not (model.compile or by_itself):
        return []
    if reason := no_compiler(device):
        return [f"model.compile=blocks: {reason}; blocks run as written"]
    compile_blocks(denoiser.model)
    return []


def _open_base(
    model: BaseModelConfig, device: str | torch.device
) -> tuple[ModelDenoiser, Any, Path | None]:
    dtype = DTYPES[model.dtype]
    family = named_family(model.family)
    if model.random_init is None:
        return open_checkpoint(model.path, device, dtype, model.revision, family, model.given)
    folder = stand_in_folder(asset(model.path))
    generator = named_generator(0, "random_init")
    module = random_tiny(asset(model.path), generator, family, model.given).to(device, dtype)
    tokenizer = (
        byte_tokenizer()
        if folder is None
        else load_tokenizer(folder, family=family, config=module.config)
    )
    return with_end_ids(ModelDenoiser.from_model(module), tokenizer), tokenizer, folder
