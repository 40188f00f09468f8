"""Model families that load without remote code: model_type -> (config class, module class)."""

from .dream import Dream as Dream
from .dream import DreamConfig as DreamConfig
from .known import known_config as known_config
from .llada import LLaDA as LLaDA
from .llada import LLaDAConfig as LLaDAConfig

FAMILIES = {"llada": (LLaDAConfig, LLaDA), "Dream": (DreamConfig, Dream)}
