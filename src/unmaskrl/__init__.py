"""unmaskrl: RL post-training of masked diffusion language models. What is imported here is kept.

So are ``unmaskrl.config.ASSETS`` and, of ``unmaskrl.tokenizer``, ``load_tokenizer``, ``encode_prompt`` and ``decode_texts``,
which the README uses; everything else may change.
"""

from . import estimators as estimators
from . import losses as losses
from . import tasks as tasks
from .advantages import group_mean as group_mean
from .advantages import group_mean_std as group_mean_std
from .decoding import decode as decode
from .decoding import planned_calls as planned_calls
from .denoiser import Denoiser as Denoiser
from .denoiser import load_denoiser as load_denoiser
from .denoiser import save_model as save_model
from .estimators import Estimator as Estimator
from .priors import anchored_canvas as anchored_canvas
from .priors import blank_canvas as blank_canvas
from .priors import choose_anchors as choose_anchors
from .scoring import backward_in_chunks as backward_in_chunks
from .scoring import token_logps as token_logps
from .scoring import view_logps as view_logps
from .types import Canvas as Canvas
from .types import LossOutputs as LossOutputs
from .types import Rollout as Rollout
from .types import TrainBatch as TrainBatch
from .types import Views as Views

__version__ = "0.1.0"
