"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from rlctl_train.config.base import Choices, Config


class OptimConfig(Config):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with warm-up and a schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Term added to the denominator."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Global L2 norm above which gradients are scaled down."""
    schedule: Annotated[
        Literal["constant", "cosine", "linear"],
        Choices(
            {
                "constant": "stays at `lr`",
                "cosine": "falls along half a cosine to `min_lr_ratio` of `lr`",
                "linear": "falls along a line to `min_lr_ratio` of `lr`",
            }
        ),
    ] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the rate rises linearly from zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final rate of cosine and linear schedules, as a share of `lr`."""
