"""Which settings fit together: what makes no sense is refused with what to change, odd combinations
are named.

What a component can do stands with the component (``Estimator``, ``PolicyLoss``, ``Advantage``,
``Rule``): the checks ask it, and know none by its name.
"""

from __future__ import annotations

from ..core.decoding import RULES, Rule, check_decode, planned_calls, whole_blocks
from ..core.decoding.law import MAX_KEPT
from ..core.decoding.select import NATS
from ..core.estimators.base import NOT_BLOCKWISE, READING, Estimator
from ..core.threshold_head import check_grid
from .engines import check_engine, check_engine_blocks
from .optimizers import check_optimizer
from .registry import COMPONENTS, Method, build_method, check_component, selection_rule
from .schema import BaseModelConfig, PriorConfig, Recipe, SFTRecipe

ADAPTIVE = ", ".join(name for name, rule in RULES.items() if rule.prefix is not None)


def check_recipe(recipe: Recipe) -> Method:
    """Refuse settings that fail or make no sense, with what to change; the method they make."""
    d = recipe.decode
    p = recipe.prior
    check_component(recipe.task, COMPONENTS["task"], "task")
    method = build_method(recipe)
    rule = method.rule
    check_decode(
        d.gen_length, d.block_length, d.steps, rule, d.temperature, d.exit_at, d.gamma, cut=True
    )
    if rule.prefix is None and d.gamma is not None:
        raise ValueError(
            f"decode.gamma bounds the adaptive rules {ADAPTIVE}; select={d.select} has a quota: "
            "set gamma=null"
        )
    if rule.prefix is not None and rule.unit != NATS and d.gamma is None:
        raise ValueError(
            f"decode.select={d.select} needs decode.gamma, {rule.unit}; only the eb rules can have "
            "a threshold head"
        )
    if d.temperature == 0:
        raise ValueError(
            "decode.temperature is 0: all rollouts of a group would be the same; set it above 0"
        )
    if recipe.run.variance_draws == 1:
        raise ValueError(
            "run.variance_draws is 1: a variance needs at least 2 draws; set 0 to switch it off"
        )
    if p.name == "anchors":
        _check_anchors(p)
        if p.when == "all_wrong" and rule.prefix is not None and d.gamma is None:
            raise ValueError(
                "prior.when=all_wrong decodes some groups twice, and a threshold head learns from "
                "one choice each: set decode.gamma to a number"
            )
    check_optimizer(recipe.optimizer)
    check_weights(recipe.model, recipe.train.shard)
    _check_rollout_dtype(recipe)
    check_engine(recipe, method)
    _check_sampler(recipe, rule)
    _check_method(recipe, method)
    return method


def _check_anchors(p: PriorConfig) -> None:
    if p.keep == 0 and not p.keep_end and not p.keep_to:
        raise ValueError("prior.keep is 0, so nothing is anchored; raise it or set prior.name=none")
    if p.keep_end is not None and p.adapt_to is not None:
        raise ValueError(
            "prior.keep_end and prior.adapt_to both steer prior.keep; set one of them to null"
        )
    if p.only_correct and p.source == "reference":
        raise ValueError(
            "prior.only_correct needs prior.source, a file of `unmaskrl prior`: the task's own "
            "answers are all right"
        )
    if p.keep_to is not None and p.keep_to < p.keep:
        raise ValueError(f"prior.keep_to {p.keep_to:g} is below prior.keep {p.keep:g}; raise it")
    if p.chunk[0] > p.chunk[1]:
        raise ValueError(
            f"prior.chunk {list(p.chunk)} is from..to; expected no more than the other"
        )
    if p.chunk[1] > 1 and "most_predictable" in p.select:
        raise ValueError(
            f"prior.chunk is for random selections, and prior.select is {p.select}: leave one out"
        )
    if p.when == "all_wrong" and (p.adapt_share or p.adapt_to is not None):
        raise ValueError(
            "prior.adapt_share and prior.adapt_to steer what every group is given, and with "
            "prior.when=all_wrong only wrong groups are given anything: set them to null"
        )


def check_blocks(recipe: Recipe, method: Method, grid: int | None) -> None:
    """ValueError if a recipe does not fit a model whose blocks have ``grid`` tokens (None: full
    attention).
    """
    d = recipe.decode
    check_decode(
        d.gen_length, d.block_length, d.steps, method.rule, d.temperature, d.exit_at, d.gamma, grid
    )
    if grid is not None and not method.estimator.blockwise:
        raise ValueError(f"estimator {recipe.estimator['name']}: {NOT_BLOCKWISE}")
    check_engine_blocks(recipe, grid)


def block_notes(recipe: Recipe, grid: int | None) -> list[str]:
    """What a block-causal model makes of anchors."""
    if grid is None or recipe.prior.name != "anchors":
        return []
    keep = recipe.prior.keep
    return [
        f"prior.keep={keep:g}: a block-causal model sees an anchor only from the anchor's own "
        f"block on; at this share a block of {grid} tokens holds {keep * grid:.1f} that can help "
        "it, and all anchors before it are as visible as any text"
    ]


def check_supervised(recipe: SFTRecipe) -> None:
    """ValueError if the parts of a supervised recipe do not fit together."""
    check_optimizer(recipe.optimizer)
    check_weights(recipe.model, recipe.train.shard)
    m = recipe.model
    if m.lora and m.lora.merge_rollout:
        raise ValueError("model.lora.merge_rollout is for rollouts, and sft makes none: drop it")
    if not m.path and m.d_model % (2 * m.n_heads):  # values of a head are rotated in pairs
        raise ValueError(
            f"model.d_model {m.d_model} / model.n_heads {m.n_heads} must be an even whole number"
        )
    needs = {"model.lora": m.lora, "model.random_init": m.random_init}
    if not m.path and (given := next((name for name, value in needs.items() if value), None)):
        raise ValueError(f"{given} changes a checkpoint: set model.path to one, or leave it out")


def check_eval_decode(recipe: SFTRecipe, grid: int | None) -> None:
    """ValueError if a trained model whose blocks have ``grid`` tokens could not be evaluated as the
    recipe says.
    """
    for task, d in recipe.eval_decode.items():
        rule = selection_rule(d.select)
        settings = (d.gen_length, d.block_length, d.steps, rule, d.temperature, d.exit_at, d.gamma)
        try:
            check_decode(*settings, grid)
        except ValueError as error:
            raise ValueError(f"eval_decode.{task}: {error}") from None


def check_weights(m: BaseModelConfig, shard: str) -> None:
    """ValueError if the weights cannot be kept or split as they are to be."""
    if m.quantize and not m.lora:
        raise ValueError(
            f"model.quantize={m.quantize}: 4-bit weights cannot be trained; set model.lora.rank, "
            "for instance 128"
        )
    if shard != "none" and m.quantize:
        raise ValueError(
            f"train.shard={shard} with model.quantize={m.quantize}: 4-bit blocks cannot be "
            "split; drop one"
        )


def _check_rollout_dtype(recipe: Recipe) -> None:
    """Rollouts in another precision need whole weights."""
    m = recipe.model
    t = recipe.train
    if t.shard != "none" and m.rollout_dtype not in (None, m.dtype):
        raise ValueError(
            f"train.shard={t.shard} with model.rollout_dtype={m.rollout_dtype}: set "
            "rollout_dtype=null"
        )


def _check_sampler(recipe: Recipe, rule: Rule) -> None:
    """The sampler's grid and modes."""
    t = recipe.sampler
    d = recipe.decode
    try:
        check_grid(t.gammas, t.start, t.floor)
    except ValueError as error:
        raise ValueError(f"sampler.{error}") from None
    if t.mode != "policy" and (rule.unit != NATS or d.gamma is not None):
        raise ValueError(
            f"sampler.mode={t.mode} trains a head that chooses gamma of entropy-bounded "
            "decoding; "
            f"set decode.select=eb decode.gamma=null (got select={d.select}, gamma={d.gamma})"
        )


def _check_method(recipe: Recipe, method: Method) -> None:
    """Estimator, advantage and loss are a method together, and one that fits the decoding."""
    estimator = method.estimator
    loss = method.loss
    names = {section: getattr(recipe, section)["name"] for section in ("estimator", "loss")}
    if loss.kl_coef > 0 and loss.kl_to == "old" and recipe.train.num_iterations == 1:
        raise ValueError(
            "loss.kl_to=old with train.num_iterations=1: the only update starts at the old policy, "
            "where that KL is 0; use kl_to=ref, or more iterations"
        )
    if estimator.bound and loss.takes_ratio:
        raise ValueError(
            f"estimator {names['estimator']} bounds log-likelihoods, and loss {names['loss']} "
            "takes their ratio, which a bound does not give; use loss.name=reinforce, or "
            "estimator.name=elbo"
        )
    if estimator.bound and loss.kl_coef > 0:
        raise ValueError(
            f"estimator {names['estimator']} has no KL: differences of bounds are no estimate of "
            "it; set loss.kl_coef=0"
        )
    if loss.uses_behavior:
        _check_importance(recipe, method)
    if method.advantage.weighs_logps and loss.takes_ratio:
        raise ValueError(
            f"advantage {recipe.advantage['name']} weighs log-likelihoods; use "
            f"loss.name=reinforce, not {names['loss']}"
        )
    _check_truncation(recipe, estimator)
    d = recipe.decode
    estimator.fits(d.gen_length, d.block_length, _calls(recipe, method.rule))


def _check_truncation(recipe: Recipe, estimator: Estimator) -> None:
    """What scores drawn tokens needs the ids that each was drawn from, which only top_k bounds."""
    d = recipe.decode
    recorded = d.top_k is not None and d.top_k <= MAX_KEPT
    if d.truncates and estimator.probability_of is not None and not recorded:
        raise ValueError(
            f"estimator {recipe.estimator['name']} scores tokens among those that each was drawn "
            f"from, and with decode.top_k={_null(d.top_k)} decode.top_p={_null(d.top_p)} these may "
            f"be any number: set decode.top_k to at most {MAX_KEPT}"
        )


def _null(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"


def _calls(recipe: Recipe, rule: Rule, grid: int | None = None, exits: bool = True) -> int:
    """Denoiser calls of a rollout without anchors, whose prompt ends with a block."""
    d = recipe.decode
    blocks = whole_blocks(d.gen_length, d.block_length)
    # adaptive rules: one token per call at worst
    steps = d.steps if rule.prefix is None else d.gen_length
    return planned_calls(blocks, d.gen_length, steps, d.exit_at if exits else None, grid)


def _check_importance(recipe: Recipe, method: Method) -> None:
    """Importance weights need the probability that each token was drawn with, and a surrogate of
    the same event.
    """
    estimator = method.estimator
    name = recipe.estimator["name"]
    if method.rule.needs_draw:
        raise ValueError(
            f"loss.is_cap with decode.select={recipe.decode.select}: which token is revealed then "
            "depends on the draw, so its log-probability is not that of the event (exact=False); "
            "use select=entropy, max_prob, margin or eb"
        )
    if estimator.hides_prompt:
        raise ValueError(
            f"loss.is_cap with estimator {name}, which hides prompt tokens: the weights compare "
            "with rollouts that saw the whole prompt; set estimator.p_mask_prompt=0"
        )
    if estimator.probability_of is None:
        raise ValueError(
            f"loss.is_cap with estimator {name}: its token scores are no probabilities of the "
            "drawn tokens, so their ratio to the rollout's is no importance weight; use "
            "estimator.name=two_mean_field, trajectory or mean_field (p_mask_prompt=0), or "
            "loss.is_cap=null"
        )
    if estimator.probability_of == READING and not _reads_in_order(recipe, method.rule):
        raise ValueError(
            f"loss.is_cap with estimator {name}: it scores tokens one by one in reading order, "
            "and rollouts are decoded otherwise; set decode.select=left_to_right "
            "decode.steps=<gen_length> decode.exit_at=null"
        )


def _reads_in_order(recipe: Recipe, rule: Rule) -> bool:
    """Whether rollouts reveal one token per call from left to right, to the end."""
    d = recipe.decode
    exits = d.exit_at is not None and d.exit_at < 1
    return rule.in_order and d.steps >= d.gen_length and not exits


def warnings_for(
    recipe: Recipe, method: Method | None = None, grid: int | None = None
) -> list[str]:
    """Settings that work but probably are not what is wanted, of a model whose blocks have ``grid``
    tokens (None: full attention, or not known yet).
    """
    method = method or build_method(recipe)
    return [
        *_exit_warnings(recipe, method.rule, grid),
        *_precision_warnings(recipe),
        *_anchor_warnings(recipe),
        *_method_warnings(recipe, method),
    ]


def _exit_warnings(recipe: Recipe, rule: Rule, grid: int | None) -> list[str]:
    d = recipe.decode
    if d.exit_at is None or d.exit_at >= 1:
        return []
    notes = []
    if grid is None and d.block_length == d.gen_length and not rule.in_order:
        notes.append(
            "decode.exit_at with one full-length block fills the least certain tokens (often the "
            "answer) in one call; use decode.block_length < decode.gen_length, so that the exit "
            "meets the end of the completion"
        )
    calls = _calls(recipe, rule, grid)
    without = _calls(recipe, rule, grid, exits=False)
    if rule.prefix is None and calls >= without:
        notes.append(
            f"decode.exit_at={d.exit_at} saves nothing: a blank rollout takes {calls} calls with "
            f"it and {without} without; lower it"
        )
    return notes


def _precision_warnings(recipe: Recipe) -> list[str]:
    model = recipe.model
    notes = []
    if model.dtype == "bfloat16" and not model.lora and recipe.optimizer.lr < 1e-4:
        notes.append(
            f"optimizer.lr={recipe.optimizer.lr:g} on bfloat16 weights: they have 8 bits of "
            "precision, and most updates of this size round away; train adapters "
            "(model.lora.rank=128), which are float32, or model.dtype=float32"
        )
    if model.rollout_dtype not in (None, model.dtype):
        notes.append(
            "model.rollout_dtype differs from model.dtype: scoring is not sampling; watch "
            "health/behavior_gap"
        )
    if model.lora and model.lora.merge_rollout and model.dtype == "bfloat16":
        notes.append(
            "model.lora.merge_rollout in bfloat16: a sum keeps 8 bits, so small adapters vanish in "
            "large weights and rollouts are those of the base until they have grown; watch "
            "health/behavior_gap"
        )
    return notes


def _anchor_warnings(recipe: Recipe) -> list[str]:
    """Settings of anchors where there are none."""
    if recipe.prior.name != "none":
        return []
    notes = []
    if recipe.estimator.get("hide_anchors"):
        notes.append("estimator.hide_anchors does nothing without anchors (prior.name=none)")
    if recipe.prior.adapt_share or recipe.prior.only_correct:
        notes.append(
            "prior.adapt_share and prior.only_correct do nothing without anchors (prior.name=none)"
        )
    if recipe.prior.when != "always":
        notes.append("prior.when does nothing without anchors (prior.name=none)")
    return notes


def _method_warnings(recipe: Recipe, method: Method) -> list[str]:
    """Losses and estimators that do not measure what their name says under this recipe."""
    estimator = method.estimator
    name = recipe.estimator["name"]
    notes = []
    d = recipe.decode
    if d.truncates and estimator.probability_of is None:
        notes.append(
            f"decode.top_k={_null(d.top_k)} decode.top_p={_null(d.top_p)} with estimator {name}: "
            "rollouts are drawn from the kept tokens, and scores are of the policy over all; "
            "trajectory, two_mean_field, left_to_right and mean_field (p_mask_prompt=0) score what "
            "was drawn"
        )
    if method.loss.kl_coef > 0 and method.loss.kl == "k1":
        notes.append(
            "loss.kl=k1: its gradient is that of the log-likelihood, not of the KL, and pulls "
            "nowhere on average; loss.kl=k2 or k3 have one"
        )
    if estimator.needs_updates and recipe.train.num_iterations == 1:
        notes.append(
            f"estimator {name} spreads its masking rate over the inner updates; there is one "
            "(train.num_iterations=1)"
        )
    if estimator.probability_of == READING and not _reads_in_order(recipe, method.rule):
        notes.append(
            f"estimator {name} scores one token at a time in reading order; rollouts are decoded "
            "otherwise (decode.select=left_to_right decode.steps=<gen_length> decode.exit_at=null "
            "would match)"
        )
    if estimator.exact_event and method.rule.needs_draw:
        notes.append(
            f"decode.select={recipe.decode.select} looks at the drawn tokens, so the replayed "
            "trajectory is not the rollout's probability; entropy, max_prob or margin make it exact"
        )
    return notes
