"""What every part of a recipe is, and the part that evaluation and the commands share: decoding."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ..core.rollouts import DecodeSettings


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused by ``load_recipe`` with the nearest known
    name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """True is no number, alone or in a list: Python would count it as 1."""
        kind = str(cls.model_fields[info.field_name or ""].annotation)
        members = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in members) and "bool" not in kind:
            raise ValueError("true and false are no values of this setting")
        return value


class DecodeConfig(Section):
    """One decode configuration, shared by training, evaluation and `sample`."""

    gen_length: int = Field(default=64, ge=1, description="tokens of a completion")
    block_length: int = Field(
        default=16, ge=1, description="tokens of a block; blocks are decoded from left to right"
    )
    steps: int = Field(default=64, ge=1, description="denoiser calls for a fully open completion")
    select: str = Field(
        default="confidence",
        description="the rule that chooses the next positions: confidence, max_prob, margin, "
        "entropy, random, left_to_right, eb, factor, confidence_threshold, or "
        "module:factory",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="of rollouts; evaluation is greedy unless eval.temperature says else",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="tokens are drawn from so many of the most probable ones; null: from all",
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="of these, from the fewest whose probabilities add up to it; null or 1: from "
        "all. Neither acts at temperature 0",
    )
    exit_at: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="temporal pruning: share of tokens decided before the exit",
    )
    gamma: float | None = Field(
        default=None,
        description="bound of the adaptive rules eb, confidence_threshold, factor; null: the "
        "model's threshold head chooses",
    )

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out of what others are drawn from."""
        return self.top_k is not None or self.top_p not in (None, 1)

    def at(self, temperature: float) -> DecodeSettings:
        """What an engine decodes with, at a temperature of its own."""
        return DecodeSettings(
            block_length=self.block_length,
            steps=self.steps,
            select=self.select,
            temperature=temperature,
            exit_at=self.exit_at,
            top_k=self.top_k,
            top_p=self.top_p,
        )
