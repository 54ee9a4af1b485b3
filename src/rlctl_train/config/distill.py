"""On-policy distillation: a student learns from what a teacher says of the student's own responses.

Formulas are in `rlctl_train.algos.distill`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from rlctl_train.config.base import Config
from rlctl_train.config.policy import PolicyGradient, Role


class SampledSignal(Config):
    """Reward each sampled token by the teacher's log-probability of it less the student's own: reverse KL."""

    type: Literal["sampled"] = "sampled"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Discount per token of what later tokens earn; 0 judges each token by itself."""


class TopKSignal(Config):
    """Pull the student's distribution to the teacher's over the teacher's likeliest tokens: forward KL."""

    type: Literal["top_k"] = "top_k"
    k: PositiveInt = 64
    """The teacher's likeliest tokens that are compared at each place; a smaller vocabulary is compared whole."""


Signal = Annotated[SampledSignal | TopKSignal, Field(discriminator="type")]


class DistillConfig(PolicyGradient):
    """On-policy distillation from a larger or better model (Agarwal et al. 2023, arXiv:2306.13649)."""

    type: Literal["distill"] = "distill"
    teacher_path: str
    """Folder or hub id of the teacher, whose tokenizer gives tokens the same numbers as the student's."""
    signal: Signal = SampledSignal()
    """What the student is told."""
    coef: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the teacher's part of the advantage, or of the loss."""
    task_coef: NonNegativeFloat = 0.0
    """Factor on the score against its group, over the standard deviation, which joins the advantage; 0 turns it off."""
    group_size: PositiveInt = 1
    """Responses sampled per prompt; `task_coef` above 0 compares them and needs two."""

    def reads_old_logp(self) -> bool:
        """Return whether the advantage reads `old_logp`: it does where it compares sampled tokens."""
        return isinstance(self.signal, SampledSignal)

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles this algorithm needs, actor first."""
        return (*super().roles(), "teacher")
