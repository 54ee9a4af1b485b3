"""Algorithms and their settings; class defaults are the vetted ones. Formulas are in `rlctl_train.algos`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from rlctl_train.config.actor_critic import PpoConfig, VapoConfig
from rlctl_train.config.base import Config
from rlctl_train.config.critic_free import (
    GdpoConfig,
    GpgConfig,
    OpoConfig,
    OtbConfig,
    PassKGrpoConfig,
    ReinforcePpBaselineConfig,
    ReinforcePpConfig,
    RemaxConfig,
    RlooConfig,
)
from rlctl_train.config.distill import DistillConfig
from rlctl_train.config.losses import ClipLoss, PolicyLossConfig
from rlctl_train.config.policy import NormalizedGroup, Role
from rlctl_train.config.preference import SpinConfig, SppoConfig
from rlctl_train.config.prime import PrimeConfig


class GrpoConfig(NormalizedGroup):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300)."""

    type: Literal["grpo"] = "grpo"


class DapoConfig(NormalizedGroup):
    """Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv:2503.14476)."""

    type: Literal["dapo"] = "dapo"
    group_size: Annotated[int, Field(ge=2)] = 16
    """Responses sampled per prompt; the group is the baseline."""
    loss: PolicyLossConfig = ClipLoss(clip_high=0.28, dual_clip=None)
    """The policy loss; the paper's upper clip is above the lower one, so that rare tokens can grow."""
    max_rounds: PositiveInt = 10
    """Generation rounds of a step at most: groups of equal scores are left out and replaced by new prompts' groups.

    A step still short after them is filled up with groups left out; 1 replaces nothing."""
    overlong_buffer_tokens: PositiveInt | None = None
    """Last tokens before `rollout.max_response_tokens` in which the penalty on length grows from 0 to its full size.

    Unset takes a fifth of `rollout.max_response_tokens`, at least one token."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Taken off the reward of a response of `rollout.max_response_tokens`; 0 turns the penalty on length off."""


class SftConfig(Config):
    """Supervised fine-tuning on the `response` column: cross-entropy on completion tokens only."""

    type: Literal["sft"] = "sft"

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles this algorithm needs."""
        return ("actor",)


RlConfig = (
    GrpoConfig
    | DapoConfig
    | PassKGrpoConfig
    | GdpoConfig
    | RlooConfig
    | OpoConfig
    | GpgConfig
    | OtbConfig
    | ReinforcePpConfig
    | ReinforcePpBaselineConfig
    | RemaxConfig
    | PpoConfig
    | VapoConfig
    | SpinConfig
    | SppoConfig
    | DistillConfig
    | PrimeConfig
)
AlgoConfig = Annotated[RlConfig | SftConfig, Field(discriminator="type")]
