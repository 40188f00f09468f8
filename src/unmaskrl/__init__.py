"""unmaskrl: RL post-training of masked diffusion language models. What is imported here is kept.

So are, of ``unmaskrl.models.tokenizer``, ``encode_prompt`` and ``decode_texts``; everything else
may change.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import tasks as tasks
    from . import testing as testing
    from .core import estimators as estimators
    from .core import losses as losses
    from .core.advantages import group_mean as group_mean
    from .core.advantages import group_mean_std as group_mean_std
    from .core.block_causal import BlockCausal as BlockCausal
    from .core.canvas import anchored_canvas as anchored_canvas
    from .core.canvas import blank_canvas as blank_canvas
    from .core.canvas import choose_anchors as choose_anchors
    from .core.decoding import decode as decode
    from .core.decoding import planned_calls as planned_calls
    from .core.denoiser import Denoiser as Denoiser
    from .core.estimators import Estimator as Estimator
    from .core.rollouts import DecodeSettings as DecodeSettings
    from .core.rollouts import LocalRollouts as LocalRollouts
    from .core.rollouts import Rollouts as Rollouts
    from .core.scoring import backward_in_chunks as backward_in_chunks
    from .core.scoring import token_logps as token_logps
    from .core.scoring import view_logps as view_logps
    from .core.types import Canvas as Canvas
    from .core.types import LossOutputs as LossOutputs
    from .core.types import Rollout as Rollout
    from .core.types import TrainBatch as TrainBatch
    from .core.types import Views as Views
    from .evaluation.evaluate import EvalResult as EvalResult
    from .evaluation.front import evaluate as evaluate
    from .models.checkpoint import load_denoiser as load_denoiser
    from .models.checkpoint import save_model as save_model
    from .models.families.family import Family as Family
    from .models.families.family import MaskPredictor as MaskPredictor
    from .models.loading import Model as Model
    from .models.loading import load as load
    from .reporting.notebook import rollout_html as rollout_html
    from .tasks.base import Grade as Grade
    from .tasks.base import Task as Task
    from .training.front import train as train

__version__ = "0.1.0"
# Where each public name lives: a module, or "module:name". It is loaded when it is first asked for,
# so that `import unmaskrl.tasks` costs no torch.
_HOMES = {
    "Canvas": "core.types:Canvas",
    "DecodeSettings": "core.rollouts:DecodeSettings",
    "BlockCausal": "core.block_causal:BlockCausal",
    "Denoiser": "core.denoiser:Denoiser",
    "Estimator": "core.estimators:Estimator",
    "EvalResult": "evaluation.evaluate:EvalResult",
    "Family": "models.families.family:Family",
    "Grade": "tasks.base:Grade",
    "LocalRollouts": "core.rollouts:LocalRollouts",
    "LossOutputs": "core.types:LossOutputs",
    "MaskPredictor": "models.families.family:MaskPredictor",
    "Model": "models.loading:Model",
    "Rollout": "core.types:Rollout",
    "Rollouts": "core.rollouts:Rollouts",
    "Task": "tasks.base:Task",
    "TrainBatch": "core.types:TrainBatch",
    "Views": "core.types:Views",
    "anchored_canvas": "core.canvas:anchored_canvas",
    "backward_in_chunks": "core.scoring:backward_in_chunks",
    "blank_canvas": "core.canvas:blank_canvas",
    "choose_anchors": "core.canvas:choose_anchors",
    "decode": "core.decoding:decode",
    "estimators": "core.estimators",
    "evaluate": "evaluation.front:evaluate",
    "group_mean": "core.advantages:group_mean",
    "group_mean_std": "core.advantages:group_mean_std",
    "load": "models.loading:load",
    "load_denoiser": "models.checkpoint:load_denoiser",
    "losses": "core.losses",
    "planned_calls": "core.decoding:planned_calls",
    "rollout_html": "reporting.notebook:rollout_html",
    "save_model": "models.checkpoint:save_model",
    "tasks": "tasks",
    "testing": "testing",
    "token_logps": "core.scoring:token_logps",
    "train": "training.front:train",
    "view_logps": "core.scoring:view_logps",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = import_module(f".{module}", __name__)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
