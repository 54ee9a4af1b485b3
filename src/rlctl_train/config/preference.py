"""Algorithms that learn from responses as wholes: pairs of them, or each by its score.

Formulas are in `rlctl_train.algos`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlctl_train.config.losses import DpoLoss, PairLossConfig, SppoLoss
from rlctl_train.config.policy import AGGREGATIONS, PolicyGradient, Role


class ResponseLevel(PolicyGradient):
    """The loss of a response is one number, which its tokens share."""

    # Records are frozen, so that a field may be narrower here than where it comes from.
    aggregation: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        Literal["seq-mean-token-sum"], AGGREGATIONS
    ] = "seq-mean-token-sum"
    """How per-token losses become one number; a response's share is their sum."""


class SpinConfig(ResponseLevel):
    """Self-play fine-tuning by online DPO or IPO: two responses a prompt, the better one chosen (arXiv:2401.01335)."""

    type: Literal["spin"] = "spin"
    loss: PairLossConfig = DpoLoss()  # pyright: ignore[reportIncompatibleVariableOverride]
    """The loss of a pair."""
    group_size: Annotated[int, Field(ge=2, le=2)] = 2
    """Responses sampled per prompt; the two make a pair."""
    refresh_every_steps: NonNegativeInt = 10
    """Steps after which the policy becomes the reference it is compared with from then on; 0 keeps the first one."""

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles this algorithm needs: the loss itself compares with the reference."""
        return ("actor", "reference")


class SppoConfig(ResponseLevel):
    """Self-play preference optimisation: each response's log-ratio is fitted to its score (arXiv:2405.00675)."""

    type: Literal["sppo"] = "sppo"
    loss: SppoLoss = SppoLoss()  # pyright: ignore[reportIncompatibleVariableOverride]
    """The squared error of the log-ratio."""
    group_size: PositiveInt = 8
    """Responses sampled per prompt; the whole step's responses are the baseline."""
    eta: NonNegativeFloat = 1.0
    """Nats of log-ratio that a response of score 1 above the baseline is to gain.

    It is the sharpness of the baseline's soft mean too, which with 0 is the arithmetic one (and nothing is learnt)."""
