"""Policy losses: how the gap between the old and the current policy is held. Formulas are in `rlctl_train.algos`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from rlctl_train.config.base import Config


class ClipLoss(Config):
    """The clipped ratio of PPO, with dual clip (arXiv:1707.06347, arXiv:1912.09729)."""

    type: Literal["clip"] = "clip"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip: the probability ratio is held above 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Upper clip: the probability ratio is held below 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound on the loss of tokens with negative advantage, as a multiple of the advantage; unset turns it off."""


PolicyLossConfig = ClipLoss
