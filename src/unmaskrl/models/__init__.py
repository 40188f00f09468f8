"""Model families that load without remote code: model_type -> (config class, module class)."""

from .llada import LLaDA as LLaDA
from .llada import LLaDAConfig as LLaDAConfig

FAMILIES = {"llada": (LLaDAConfig, LLaDA)}
