"""Algorithms with a learned critic. Formulas are in `rlctl_train.algos`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlctl_train.config.base import Config
from rlctl_train.config.losses import ClipLoss, PolicyLossConfig
from rlctl_train.config.policy import ActorCritic


class PowResample(Config):
    """Draw a response with a chance proportional to a power of its score's size."""

    type: Literal["pow"] = "pow"
    power: PositiveFloat = 2.0
    """Exponent; more of it favours the largest scores more."""


class MaxMinResample(Config):
    """Draw only responses of the batch's highest and of its lowest score, all alike."""

    type: Literal["max_min"] = "max_min"


class MaxRandomResample(Config):
    """Draw a response of the batch's highest score four times as often as any other."""

    type: Literal["max_random"] = "max_random"


Resample = Annotated[PowResample | MaxMinResample | MaxRandomResample, Field(discriminator="type")]


class PpoConfig(ActorCritic):
    """Proximal policy optimisation with a learned critic (Schulman et al. 2017, arXiv:1707.06347)."""

    type: Literal["ppo"] = "ppo"
    resample: Resample | None = None
    """Learn from as many responses drawn with replacement by score, after advantages (PF-PPO, arXiv:2409.06957).

    Unset learns from each response once."""


class VapoConfig(ActorCritic):
    """Value-based augmented PPO (Yue et al. 2025, arXiv:2504.05118)."""

    type: Literal["vapo"] = "vapo"
    loss: PolicyLossConfig = ClipLoss(clip_high=0.28, dual_clip=None)
    """The policy loss; the paper's upper clip is above the lower one, so that rare tokens can grow."""
    group_size: PositiveInt = 16
    """Responses sampled per prompt: the paper reads few prompts often."""
    critic_warmup_steps: NonNegativeInt = 50
    """First steps in which only the critic learns, from the returns of a policy that stands still."""
    critic_lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """GAE lambda of the critic's targets; 1 makes them the return itself."""
    length_alpha: PositiveFloat | None = 0.05
    """Alpha of the policy's GAE lambda, 1 - 1/(alpha * l) for a response of l tokens, at least 0; unset takes `lam`."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE lambda of the policy where `length_alpha` is unset."""
    lm_coef: NonNegativeFloat = 0.1
    """Factor on the mean negative log-likelihood of the tokens of right responses; 0 turns it off."""
