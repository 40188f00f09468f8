"""Which settings fit together: what makes no sense is refused with what to change, odd combinations
are named.
"""

from __future__ import annotations

from ..core.decoding import RULES, check_decode, planned_calls
from ..core.decoding.select import NATS
from ..core.estimators import ESTIMATORS
from ..core.estimators.base import READING
from ..core.threshold_head import check_grid
from .engines import check_engine
from .optimizers import check_optimizer
from .registry import COMPONENTS, check_component, make_estimator, make_loss, setting
from .schema import Recipe

ADAPTIVE = ", ".join(name for name, rule in RULES.items() if rule.prefix is not None)
CLIPPED = ("token_clip", "sequence_clip", "linear_bound")


def check_recipe(recipe: Recipe) -> Recipe:
    """Refuse settings that fail or make no sense, with what to change."""
    d = recipe.decode
    p = recipe.prior
    for section, table in COMPONENTS.items():
        check_component(getattr(recipe, section), table, section)
    rule = check_decode(
        d.gen_length, d.block_length, d.steps, d.select, d.temperature, d.exit_at, d.gamma
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
        if p.keep == 0 and not p.keep_end:
            raise ValueError(
                "prior.keep is 0, so nothing is anchored; raise it or set prior.name=none"
            )
        if p.keep_end is not None and p.adapt_to is not None:
            raise ValueError(
                "prior.keep_end and prior.adapt_to both steer prior.keep; set one of them to null"
            )
        if p.only_correct and p.source == "reference":
            raise ValueError(
                "prior.only_correct needs prior.source, a file of `unmaskrl prior`: the task's own "
                "answers are all right"
            )
    check_optimizer(recipe.optimizer)
    _check_model(recipe)
    check_engine(recipe)
    _check_sampler(recipe)
    _check_method(recipe)
    return recipe


def _check_model(recipe: Recipe) -> None:
    """What is trained, in which precision, and split how."""
    m = recipe.model
    t = recipe.train
    if m.quantize and not m.lora:
        raise ValueError(
            f"model.quantize={m.quantize}: 4-bit weights cannot be trained; set model.lora.rank, "
            "for instance 128"
        )
    if t.shard != "none" and m.quantize:
        raise ValueError(
            f"train.shard={t.shard} with model.quantize={m.quantize}: 4-bit blocks cannot be "
            "split; drop one"
        )
    if t.shard != "none" and m.rollout_dtype not in (None, m.dtype):
        raise ValueError(
            f"train.shard={t.shard} with model.rollout_dtype={m.rollout_dtype}: set "
            "rollout_dtype=null"
        )


def _check_sampler(recipe: Recipe) -> None:
    """The sampler's grid and modes."""
    t = recipe.sampler
    d = recipe.decode
    try:
        check_grid(t.gammas, t.start, t.floor)
    except ValueError as error:
        raise ValueError(f"sampler.{error}") from None
    if t.mode != "policy" and (RULES[d.select].unit != NATS or d.gamma is not None):
        raise ValueError(
            f"sampler.mode={t.mode} trains a head that chooses gamma of entropy-bounded "
            "decoding; "
            f"set decode.select=eb decode.gamma=null (got select={d.select}, gamma={d.gamma})"
        )


def _check_method(recipe: Recipe) -> None:
    """Estimator, advantage and loss: each can be built, and together they are a method."""
    loss = recipe.loss["name"]
    estimator = recipe.estimator["name"]
    make_estimator(recipe)
    kl_coef = make_loss(recipe).kl_coef
    if kl_coef > 0 and recipe.loss.get("kl_to") == "old" and recipe.train.num_iterations == 1:
        raise ValueError(
            "loss.kl_to=old with train.num_iterations=1: the only update starts at the old policy, "
            "where that KL is 0; "
            "use kl_to=ref, or more iterations"
        )
    if estimator == "sandwich" and loss in CLIPPED:
        raise ValueError(
            f"estimator sandwich bounds log-likelihoods, and loss {loss} takes their ratio, which "
            "a bound does not give; "
            "use loss.name=reinforce, or estimator.name=elbo"
        )
    if estimator == "sandwich" and kl_coef > 0:
        raise ValueError(
            "estimator sandwich has no KL: differences of upper bounds are no estimate of it; set "
            "loss.kl_coef=0"
        )
    if recipe.loss.get("is_cap") is not None:
        _check_importance(recipe)
    if recipe.advantage["name"] == "softmax_weights" and loss != "reinforce":
        raise ValueError(
            "advantage softmax_weights (wd1) weighs log-likelihoods; use loss.name=reinforce, not "
            f"{loss}"
        )
    _check_lengths(recipe)


def _check_lengths(recipe: Recipe) -> None:
    """Block lengths and segments of an estimator fit the decoding."""
    d = recipe.decode
    spec = recipe.estimator
    if spec["name"] == "sandwich" and setting(spec, ESTIMATORS, "mask") == "block":
        block = setting(spec, ESTIMATORS, "block_length")
        if d.gen_length % block:
            raise ValueError(
                f"estimator.block_length {block} does not divide decode.gen_length {d.gen_length}: "
                "SPG hides whole blocks; "
                f"use decode's ({d.block_length}), or estimator.mask=random"
            )
    calls = _calls(recipe)
    if spec["name"] == "trajectory" and (spec.get("num_segments") or 0) > calls:
        raise ValueError(
            f"estimator.num_segments {spec['num_segments']} exceeds the {calls} calls of a "
            "rollout; lower it, or unset it to "
            "score every call on its own"
        )


def _calls(recipe: Recipe, exits: bool = True) -> int:
    """Denoiser calls of a rollout without anchors."""
    d = recipe.decode
    blocks = [d.block_length] * (d.gen_length // d.block_length)
    # adaptive rules: one token per call at worst
    steps = d.steps if RULES[d.select].prefix is None else d.gen_length
    return planned_calls(blocks, d.gen_length, steps, d.exit_at if exits else None)


def _check_importance(recipe: Recipe) -> None:
    """Importance weights need the probability that each token was drawn with, and a surrogate of
    the same event.
    """
    if RULES[recipe.decode.select].needs_draw:
        raise ValueError(
            f"loss.is_cap with decode.select={recipe.decode.select}: which token is revealed then "
            "depends on the draw, so its "
            "log-probability is not that of the event (exact=False); use select=entropy, max_prob, "
            "margin or eb"
        )
    p_mask = setting(recipe.estimator, ESTIMATORS, "p_mask_prompt")
    if p_mask:
        raise ValueError(
            f"loss.is_cap with p_mask_prompt={p_mask}: the weights compare with rollouts that saw "
            "the whole prompt; "
            "set estimator.p_mask_prompt=0"
        )
    name = recipe.estimator["name"]
    of = make_estimator(recipe).probability_of
    if of is None:
        raise ValueError(
            f"loss.is_cap with estimator {name}: its token scores are no probabilities of the "
            "drawn tokens, "
            "so their ratio to the rollout's is no importance weight; use "
            "estimator.name=two_mean_field, "
            "trajectory or mean_field (p_mask_prompt=0), or loss.is_cap=null"
        )
    if of == READING and not _reads_in_order(recipe):
        raise ValueError(
            f"loss.is_cap with estimator {name}: it scores tokens one by one in reading order, "
            "and rollouts are decoded otherwise; set decode.select=left_to_right "
            "decode.steps=<gen_length> decode.exit_at=null"
        )


def _reads_in_order(recipe: Recipe) -> bool:
    """Whether rollouts reveal one token per call from left to right, to the end."""
    d = recipe.decode
    exits = d.exit_at is not None and d.exit_at < 1
    return d.select == "left_to_right" and d.steps >= d.gen_length and not exits


def warnings_for(recipe: Recipe) -> list[str]:
    """Settings that work but probably are not what is wanted."""
    d = recipe.decode
    notes = []
    estimator = recipe.estimator
    exits = d.exit_at is not None and d.exit_at < 1
    if exits and d.block_length == d.gen_length and d.select != "left_to_right":
        notes.append(
            "decode.exit_at with one full-length block fills the least certain tokens (often the "
            "answer) in one call; "
            "use decode.block_length < decode.gen_length, so that the exit meets the end of the "
            "completion"
        )
    if exits and RULES[d.select].prefix is None and _calls(recipe) >= _calls(recipe, exits=False):
        notes.append(
            f"decode.exit_at={d.exit_at} saves nothing: a blank rollout takes {_calls(recipe)} "
            "calls with it and "
            f"{_calls(recipe, exits=False)} without; lower it"
        )
    if recipe.model.dtype == "bfloat16" and not recipe.model.lora and recipe.optimizer.lr < 1e-4:
        notes.append(
            f"optimizer.lr={recipe.optimizer.lr:g} on bfloat16 weights: they have 8 bits of "
            "precision, and most updates of this size "
            "round away; train adapters (model.lora.rank=128), which are float32, or "
            "model.dtype=float32"
        )
    if recipe.estimator.get("hide_anchors") and recipe.prior.name == "none":
        notes.append("estimator.hide_anchors does nothing without anchors (prior.name=none)")
    if recipe.prior.name == "none" and (recipe.prior.adapt_share or recipe.prior.only_correct):
        notes.append(
            "prior.adapt_share and prior.only_correct do nothing without anchors (prior.name=none)"
        )
    if recipe.model.rollout_dtype not in (None, recipe.model.dtype):
        notes.append(
            "model.rollout_dtype differs from model.dtype: scoring is not sampling; watch "
            "health/behavior_gap"
        )
    if make_loss(recipe).kl_coef > 0 and recipe.loss.get("kl") == "k1":
        notes.append(
            "loss.kl=k1: its gradient is that of the log-likelihood, not of the KL, and pulls "
            "nowhere on average; "
            "loss.kl=k2 or k3 have one"
        )
    if estimator["name"] == "unigrpo" and recipe.train.num_iterations == 1:
        notes.append(
            "estimator unigrpo spreads its masking rate over the inner updates; there is one "
            "(train.num_iterations=1)"
        )
    if estimator["name"] == "left_to_right" and not _reads_in_order(recipe):
        notes.append(
            "estimator left_to_right scores one token at a time in reading order; rollouts are "
            "decoded otherwise "
            "(decode.select=left_to_right decode.steps=<gen_length> decode.exit_at=null would "
            "match)"
        )
    if estimator["name"] == "trajectory" and d.select == "confidence":
        notes.append(
            "decode.select=confidence looks at the drawn tokens, so the replayed trajectory is not "
            "the rollout's probability; "
            "entropy, max_prob or margin make it exact"
        )
    return notes
