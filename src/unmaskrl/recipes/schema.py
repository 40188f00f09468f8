"""The sections of a recipe: every setting with its default, its bounds and what it means."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, field_validator

from ..core.threshold_head import GAMMAS
from ..models.families.family import Given
from .section import DecodeConfig, Section

Component = dict[str, Any]
AUTO = "auto"


class LoRAConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) instead of full weights; without dropout."""

    rank: int = Field(
        default=128, ge=1, description="of each adapter: two matrices of rank rows and columns"
    )
    alpha: float = Field(default=64.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="linear layers by name; null: the family's (all of the blocks, without "
        "experts)",
    )
    merge_rollout: bool = Field(
        default=False, description="rollouts on a copy of the weights with the adapters added in"
    )


class BaseModelConfig(Section):
    """Which checkpoint, in which precision, and which of its weights are trained."""

    path: str = Field(
        default="mini",
        description="folder of a checkpoint, a hub id, or a shipped one (mini, mini-block, zero)",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    family: str | None = Field(
        default=None,
        description="what reads config.json and computes: llada, Dream, sdar, sdar_moe, "
        "llada2_moe, or 'module:factory' of your own; null: by config.json's model_type",
    )
    mask_id: int | None = Field(
        default=None,
        ge=0,
        description="the mask token's id, where config.json lacks it or is wrong; null: what it "
        "says, or the family's own",
    )
    eos_id: int | None = Field(default=None, ge=0, description="the same for the end of text")
    block_length: int | None = Field(
        default=None, ge=1, description="the same for the block of a block-causal family"
    )
    random_init: Literal["tiny"] | None = Field(
        default=None,
        description="a tiny random model of the same family in place of the weights, for a dry run "
        "on a laptop",
    )
    lora: LoRAConfig | None = Field(
        default=None, description="train adapters; the reference is the model without them"
    )
    quantize: Literal["nf4"] | None = Field(
        default=None, description="4-bit base weights (bitsandbytes, CUDA); needs lora"
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute blocks in the backward pass: less memory"
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="of weights and calls"
    )
    compile: Literal["none", "blocks"] | None = Field(
        default=None,
        description="blocks: the body's blocks by torch.compile, one graph for all of them; null: "
        "blocks on CUDA for LLaDA and Dream, none elsewhere",
    )

    @property
    def given(self) -> Given:
        """What is said of the model in place of its config.json."""
        return Given(mask_id=self.mask_id, eos_id=self.eos_id, block_length=self.block_length)


class ModelConfig(BaseModelConfig):
    """The model of an RL run."""

    rollout_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="precision of rollouts; if it differs from dtype, scoring is not sampling (the "
        "gap is logged)",
    )


class PriorConfig(Section):
    """Spatial pruning: tokens of a reference answer fixed in the rollout's canvas."""

    name: Literal["none", "anchors"] = Field(
        default="none", description="anchors: fix tokens of a prior answer; none: start blank"
    )
    select: Literal[
        "random", "protect_answer", "most_predictable", "protect_answer+most_predictable"
    ] = Field(
        default="protect_answer",
        description="which tokens are fixed: at random, outside the answer, or those the base "
        "model predicts best",
    )
    keep: float = Field(
        default=0.1, ge=0, le=1, description="fraction of the reference answer that is fixed"
    )
    keep_to: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="the fraction of each rollout is uniform between keep and this; null: keep",
    )
    chunk: tuple[PositiveInt, PositiveInt] = Field(
        default=(1, 1),
        description="tokens that are fixed together, from and to: random selections choose chunks",
    )
    when: Literal["always", "all_wrong"] = Field(
        default="always",
        description="all_wrong: rollouts start blank; only a group without a right one is decoded "
        "again, anchored, and right ones take the place of wrong ones (IGPO)",
    )
    most_replaced: PositiveInt | None = Field(
        default=None, description="of a group, with when=all_wrong; null: all of them"
    )
    count: Literal["reference", "outside_answer"] = Field(
        default="reference",
        description="keep of what: all its tokens, rounded; or, as STP's code, those outside the "
        "protected answer, rounded up",
    )
    keep_end: float | None = Field(
        default=None, ge=0, le=1, description="anneal keep linearly to this value; None: constant"
    )
    adapt_to: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of keep_end: move keep so that this share of anchored rollouts "
        "succeeds",
    )
    anneal_until: float = Field(
        default=0.9, gt=0, le=1, description="share of the run at which keep_end is reached"
    )
    share: float = Field(
        default=1.0, ge=0, le=1, description="share of each group's rollouts that is anchored"
    )
    adapt_share: bool = Field(
        default=False,
        description="share is the start; the more of a prompt's blank rollouts succeed, the fewer "
        "are anchored",
    )
    source: str = Field(
        default="reference",
        description="'reference' (the task's own solutions) or a file of `unmaskrl prior`",
    )
    only_correct: bool = Field(
        default=False, description="leave out the file's wrong answers: those problems start blank"
    )


class SamplerConfig(Section):
    """DiFFPO's sampler: a head that chooses gamma of entropy-bounded decoding per rollout. All
    constants are ours.
    """

    mode: Literal["policy", "sampler", "joint", "sequential"] = Field(
        default="policy",
        description="what is trained: the policy, the head (weights frozen), both, or one after "
        "the other",
    )
    gammas: tuple[float, ...] = Field(
        default=GAMMAS, description="the head's choices in nats, from 0 (one token per call)"
    )
    start: float = Field(default=0.1, description="the gamma that training begins with")
    floor: float = Field(
        default=0.02, ge=0, description="least probability of every choice, so that all are tried"
    )
    width: int = Field(default=128, ge=1, description="hidden units of the head")
    alpha: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="cost of a right answer of gen_length calls, in units of reward (not a share "
        "of it); 0: task reward only",
    )
    lr: float = Field(default=1e-3, gt=0, le=1e30, description="the head's learning rate")
    clip: float = Field(default=0.2, gt=0, lt=1, description="clip range of the head's ratio")
    entropy_coef: float = Field(
        default=0.01, ge=0, description="weight of the bonus for the entropy of the chosen gammas"
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="the head's gradient is scaled down to this norm"
    )
    switch_at: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="sequential: share of the run before the head is trained",
    )


class BaseTrainConfig(Section):
    """What both kinds of run have of a loop."""

    skip_bad_updates: int = Field(
        default=0,
        ge=0,
        description="so many updates in a row whose loss or gradient is not finite are skipped and "
        "said; one more ends the run",
    )
    ema: float = Field(
        default=0.9, ge=0, lt=1, description="decay of the weight average, per update"
    )
    shard: Literal["none", "fsdp", "zero2"] = Field(
        default="none",
        description="split weights, gradients and optimiser state over processes; zero2: weights "
        "whole in a pass",
    )


class TrainConfig(BaseTrainConfig):
    """The loop."""

    steps: int = Field(
        default=100, ge=1, description="rollout batches; each gives num_iterations updates"
    )
    minutes: float | None = Field(
        default=None, gt=0, description="stop after this wall time even if steps are left"
    )
    prompts_per_step: int = Field(
        default=16, ge=1, description="prompts of a step, over all processes"
    )
    group_size: int = Field(
        default=8, ge=2, description="rollouts per prompt; advantages compare them"
    )
    num_iterations: int = Field(
        default=4, ge=1, description="inner updates per rollout batch, each with its own masks"
    )
    num_prompts: int | None = Field(
        default=None, ge=1, description="use only the first so many training problems"
    )
    max_prompt_length: int | None = Field(
        default=None, ge=1, description="longest prompt in tokens; prompts are never cut"
    )
    long_prompts: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="longer ones stop the run, or are left out of training and evaluation and "
        "counted",
    )
    gather_rollout: bool = Field(
        default=True,
        description="sharded: a whole copy of the weights for rollouts, so that no rank waits for "
        "another's calls",
    )
    shuffle_advantages: bool = Field(
        default=False, description="control: permute advantages within each group"
    )
    reward_functions: tuple[str, ...] = Field(
        default=(),
        description="extra rewards, 'package.module:function' or 'file.py:function': TRL's "
        "contract",
    )
    max_canvases: int | Literal["auto"] = Field(
        default=AUTO,
        description="canvases whose activations are alive at once in an update, at least 1; auto: "
        "as many as fit by the memory plan",
    )

    @field_validator("max_canvases", mode="before")
    @classmethod
    def _is_auto_or_a_count(cls, value: Any) -> Any:
        if value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise ValueError(f"expected a whole number of at least 1, or {AUTO}")


class OptimizerConfig(Section):
    """The optimiser and its learning rate. Other keys are keyword arguments of its factory.

    ``adamw`` takes betas (0.9, 0.99), eps 1e-8 and weight_decay 0. ``where:name`` is any class or
    function that takes parameters and keyword arguments as those of torch.optim do, for instance
    ``torch.optim:SGD``. Weights of one dimension (norms, biases) do not decay.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        default="adamw", description="adamw, or one from elsewhere, 'torch.optim:SGD'"
    )
    # what float32 can hold after the optimiser's factors
    lr: float = Field(default=1e-4, gt=0, le=1e30, description="learning rate after warm-up")
    warmup: int = Field(default=8, ge=0, description="updates of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="of the rate after warm-up, to 0 at the last step unless constant",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the factory, ``lr`` apart."""
        return dict(self.model_extra or {})


class BaseRunConfig(Section):
    """Where a run lies, what it saves and logs: all that is not the maths of training."""

    out: str = Field(default="runs/{recipe}-s{seed}", description="run folder")
    seed: int = Field(default=0, description="of every random draw of the run")
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads; 0 measures 1 against all cores at start and takes the faster",
    )
    save_every: int = Field(default=40, ge=1, description="updates between checkpoints")
    save_minutes: float | None = Field(
        default=10.0,
        gt=0,
        description="a checkpoint also when the last one is so old; null: by updates alone",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="the newest ones; older ones are removed"
    )
    save: Literal["adapter", "merged", "both"] = Field(
        default="adapter",
        description="with adapters, what model/ holds at the end: megabytes for a base, or whole "
        "weights",
    )
    log_with: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=("tensorboard",), description="trackers, a list; one that is missing ends the run"
    )
    project: str = Field(default="unmaskrl", min_length=1, description="of the trackers")
    group: str | None = Field(
        default=None, description="runs that the tracker shows together; null: the recipe's name"
    )
    tags: tuple[str, ...] = Field(default=(), description="words the tracker finds the run by")


class RunConfig(BaseRunConfig):
    """Of an RL run."""

    probe: bool = Field(
        default=True,
        description="before step 0, check that the model fills in masked tokens of the task's own "
        "text",
    )
    variance_draws: int = Field(
        default=0,
        ge=0,
        description="log the variance of the likelihood over so many draws of masks on 4 rows per "
        "step; 0: off",
    )


class EvalConfig(Section):
    """Held-out evaluation; never anchored."""

    every: int = Field(
        default=25, ge=1, description="steps between evaluations on the validation set"
    )
    size: int = Field(default=512, ge=1, description="test problems before and after")
    size_during: int = Field(default=128, ge=1, description="validation problems during training")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    batch_size: int = Field(default=256, ge=1, description="completions decoded at once")


class Recipe(Section):
    """A whole RL run."""

    name: str = Field(default="custom", description="the run's name, in its folder and its tracker")
    model: ModelConfig = ModelConfig()
    task: Component = Field(description="problems, their references and their judge")
    prior: PriorConfig = PriorConfig()
    decode: DecodeConfig = DecodeConfig()
    rollouts: Component = Field(
        default={"name": "local"},
        description="the engine that decodes rollouts: local, sglang, or file.py:Engine",
    )
    estimator: Component = Field(
        default={"name": "elbo"}, description="the surrogate of the log-likelihood"
    )
    advantage: Component = Field(
        default={"name": "group_mean_std"}, description="from rewards to advantages"
    )
    loss: Component = Field(default={"name": "token_clip"}, description="the policy loss")
    sampler: SamplerConfig = SamplerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    eval: EvalConfig = EvalConfig()


class SFTMixture(Section):
    """One part of the training data."""

    task: Component
    gen_length: int = Field(..., ge=1, description="tokens of a completion")
    batch_size: int = Field(default=64, ge=1, description="rows of this part in a batch")
    lazy_share: float = Field(
        default=0.0, ge=0, le=1, description="share of demonstrations by the lazy policy"
    )
    lazy_from: float = Field(
        default=0.0, ge=0, le=1, description="share of the run after which lazy ones are mixed in"
    )
    num_examples: int = Field(default=20_000, ge=1)
    first: int | None = Field(
        default=None, ge=1, description="train on the first so many of them only"
    )


class SFTModel(BaseModelConfig):
    """A new architecture (``path`` empty) or a checkpoint to go on from."""

    path: str = Field(
        default="", description="a checkpoint to start from; empty: a new model of the sizes below"
    )
    d_model: PositiveInt = Field(default=128, description="width of a new model")
    n_layers: PositiveInt = Field(default=4, description="blocks of a new model")
    n_heads: PositiveInt = Field(default=4, description="attention heads of a new model")
    mlp_hidden_size: PositiveInt = Field(default=352, description="width of the MLP of a new model")


class SFTTrain(BaseTrainConfig):
    """The supervised loop."""

    steps: int = Field(default=1000, ge=1, description="updates")
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of the weight average, per update"
    )


class SFTOptimizer(OptimizerConfig):
    """As in RL, with other defaults."""

    lr: float = Field(default=2e-3, gt=0, le=1e30, description="learning rate after warm-up")
    warmup: int = Field(default=50, ge=0, description="updates of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="of the rate after warm-up, to 0 at the last step unless constant",
    )


class SFTRun(BaseRunConfig):
    """Where a supervised run lies and how it is kept."""

    log_every: int = Field(default=10, ge=1, description="steps between lines of the log")
    save_every: int = Field(default=500, ge=1, description="updates between checkpoints")


class SFTRecipe(Section):
    """A whole supervised run."""

    name: str = Field(default="custom", description="the run's name, in its folder")
    model: SFTModel = SFTModel()
    data: list[SFTMixture] = Field(description="parts of the training data, a list")
    optimizer: SFTOptimizer = SFTOptimizer()
    train: SFTTrain = SFTTrain()
    run: SFTRun = SFTRun()
    eval_decode: dict[str, DecodeConfig] = Field(
        default={}, description="decode settings of the closing evaluation, by task"
    )
