"""The section ``rollouts``: which engine, and whether it serves what the recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..core.denoiser import Denoiser
from ..core.rollouts import FEATURES, LocalRollouts, Rollouts
from ..models.served.sglang import Sglang
from ..utils.imports import is_outside
from .registry import Method, check_component, component, factory_of
from .schema import Recipe

NOT_IN_LOCKSTEP = (
    "model.lora.merge_rollout needs whole weights, and train.gather_rollout=false keeps them in "
    "shards: drop one"
)
ENGINES: Mapping[str, Callable[..., Any]] = {
    "local": LocalRollouts,
    "sglang": Sglang,
}


def make_rollouts(spec: Mapping[str, Any], denoiser: Denoiser) -> Rollouts:
    """The engine that ``{name, **settings}`` names; its factory gets the denoiser and the
    settings.
    """
    engine = component(spec, ENGINES, "rollouts", denoiser)
    if not isinstance(engine, Rollouts):
        raise ValueError(
            f"rollouts.name: {spec['name']} returns a {type(engine).__name__}; expected features, "
            "rules, sync() and sample(canvas, settings, generator, gamma)"
        )
    return engine


def check_engine(recipe: Recipe, method: Method) -> None:
    """Refuse an engine that does not exist, or whose class says that it serves too little."""
    check_component(recipe.rollouts, ENGINES, "rollouts", 1)
    factory: Any = factory_of(recipe.rollouts, ENGINES, "rollouts")
    if hasattr(factory, "check_settings"):
        settings = {key: value for key, value in recipe.rollouts.items() if key != "name"}
        try:
            factory.check_settings(**settings)
        except ValueError as error:
            raise ValueError(f"rollouts {recipe.rollouts['name']}: {error}") from None
    m = recipe.model
    if recipe.rollouts["name"] != "local" and m.rollout_dtype not in (None, m.dtype):
        raise ValueError(
            f"model.rollout_dtype={m.rollout_dtype} is the precision of the engine 'local'; with "
            f"rollouts.name={recipe.rollouts['name']} set it to null"
        )
    if m.lora and m.lora.merge_rollout:
        check_merging(recipe)
    if isinstance(factory, type) and hasattr(factory, "features"):
        refuse_unserved(recipe, method, factory)


def check_engine_blocks(recipe: Recipe, grid: int | None) -> None:
    """ValueError if the engine decodes blocks and the model has none (``grid`` None)."""
    factory = factory_of(recipe.rollouts, ENGINES, "rollouts")
    if grid is None and getattr(factory, "blocks_only", False):
        raise ValueError(
            f"rollouts {recipe.rollouts['name']} serves block-causal models (SDAR, LLaDA2), and "
            f"{recipe.model.path} has full attention: set rollouts.name=local"
        )


def engine_line(recipe: Recipe) -> str:
    """Where rollouts come from, and what the engine serves as far as its class says."""
    name = recipe.rollouts["name"]
    if name == "local":
        return "rollouts: local, decoded in this process"
    factory: Any = factory_of(recipe.rollouts, ENGINES, "rollouts")
    place = f" at {recipe.rollouts['url']}" if "url" in recipe.rollouts else ""
    if not isinstance(factory, type) or not hasattr(factory, "features"):
        return f"rollouts: {name}{place}; what it serves is asked when the run starts"
    served: Any = factory
    missing = [feature for feature in FEATURES if feature not in served.features]
    return (
        f"rollouts: {name}{place}; rules {', '.join(sorted(served.rules))}; at most "
        f"{', '.join(sorted(served.features)) or 'nothing more'}; never {', '.join(missing)}"
    )


def check_merging(recipe: Recipe) -> None:
    """ValueError where adapters cannot be merged for rollouts."""
    m = recipe.model
    name = recipe.rollouts["name"]
    if recipe.train.shard != "none" and not recipe.train.gather_rollout:
        raise ValueError(NOT_IN_LOCKSTEP)
    others = {
        f"model.quantize={m.quantize}": m.quantize is not None,
        f"model.rollout_dtype={m.rollout_dtype}": m.rollout_dtype not in (None, m.dtype),
        f"rollouts.name={name}": name != "local",
    }
    for setting, given in others.items():
        if given:
            raise ValueError(
                f"model.lora.merge_rollout merges the run's own weights in model.dtype, and "
                f"{setting} has others: drop one"
            )


def refuse_unserved(recipe: Recipe, method: Method, engine: Any) -> None:
    """ValueError for the first thing that the recipe needs and the engine does not serve."""
    name = recipe.rollouts["name"]
    unknown = set(engine.features) - FEATURES.keys()
    if unknown:
        raise ValueError(
            f"rollouts {name}: features names {sorted(unknown)[0]!r}; known: {', '.join(FEATURES)}"
        )
    own_rule = is_outside(recipe.decode.select) and name == "local"
    if recipe.decode.select not in engine.rules and not own_rule:
        raise ValueError(
            f"rollouts {name} does not serve decode.select={recipe.decode.select}; it serves "
            f"{', '.join(sorted(engine.rules)) or 'no rule'}"
        )
    for feature, setting in _needs(recipe, method):
        if feature not in engine.features:
            raise ValueError(
                f"{setting} needs rollouts with {feature} ({FEATURES[feature]}), which rollouts "
                f"{name} does not serve: change it, or set rollouts.name=local"
            )


def _needs(recipe: Recipe, method: Method) -> Iterator[tuple[str, str]]:
    """Features, each with the setting that needs it."""
    d = recipe.decode
    if recipe.prior.name != "none":
        yield "anchors", f"prior.name={recipe.prior.name}"
    if d.exit_at is not None and d.exit_at < 1:
        yield "exit_at", f"decode.exit_at={d.exit_at}"
    if d.truncates:
        yield "truncation", f"decode.top_k={d.top_k} with decode.top_p={d.top_p}"
        if method.estimator.probability_of is not None:
            yield "kept_ids", f"estimator.name={recipe.estimator['name']} with decode.top_k"
    if method.rule.prefix is not None and d.gamma is None:
        yield "gamma_function", f"decode.select={d.select} with decode.gamma=null"
    if method.estimator.follows_steps:
        yield "step_maps", f"estimator.name={recipe.estimator['name']}"
    if recipe.loss.get("is_cap") is not None:
        yield "behavior_logps", "loss.is_cap"
        yield "step_maps", "loss.is_cap"
