"""PRIME: a reward for every token, from a model that learns beside the policy.

Formulas are in `rlctl_train.algos.prime`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rlctl_train.config.base import Choices
from rlctl_train.config.optim import OptimConfig
from rlctl_train.config.policy import GroupRelative, Role


class PrimeConfig(GroupRelative):
    """Process reinforcement through implicit rewards (Cui et al. 2025, arXiv:2502.01456)."""

    type: Literal["prime"] = "prime"
    group_size: Annotated[int, Field(ge=2)] = 4
    """Responses sampled per prompt; the group is the baseline."""
    beta: PositiveFloat = 0.05
    """Reward of a token for each nat by which the reward model finds it likelier than the reference does."""
    update: Annotated[
        Literal["before", "after", "none"],
        Choices(
            {
                "before": "the reward model learns a step's outcomes, then rewards its tokens",
                "after": "it rewards the tokens as it was, then learns the outcomes",
                "none": "it stays as it began",
            }
        ),
    ] = "before"
    """When the reward model learns which of a step's responses were right."""
    reward_optim: OptimConfig = OptimConfig(lr=1e-6)
    """Optimizer of the reward model."""
    process_coef: NonNegativeFloat = 5.0
    """Factor on the reward model's part of the advantage."""
    outcome_coef: NonNegativeFloat = 5.0
    """Factor on the score's part of the advantage."""
    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Groups with a smaller share of right responses are left out and replaced by new prompts' groups."""
    max_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Groups with a larger share of right responses are left out, likewise."""
    max_rounds: PositiveInt = 4
    """Generation rounds of a step at most; what is missing after them is filled up with groups left out."""

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles this algorithm needs, actor first."""
        others: tuple[Role, ...] = tuple(role for role in super().roles() if role != "reference")
        return (*others, "reward_model", "reference")
