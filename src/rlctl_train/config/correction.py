"""Rollout correction: what is done about tokens that the rollout engine and the trainer give different probabilities.

Every ratio here is the trainer's probability of a sampled token over the rollout engine's. Formulas are in
`rlctl_train.algos.correction`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from rlctl_train.config.base import Choices, Config

AtLeastOne = Annotated[float, Field(ge=1)]
AtMostOne = Annotated[float, Field(gt=0, le=1)]
RejectionLevel = Literal["token", "sequence", "geometric"]

REJECTION_LEVELS = Choices(
    {
        "token": "each token by itself",
        "sequence": "the sum over a sequence, which leaves or stays whole",
        "geometric": "the mean over a sequence, which leaves or stays whole: longer ones are not judged more harshly",
    }
)
DIVERGENCE_LEVELS = Choices({**REJECTION_LEVELS.meanings, "max": "the largest of a sequence, which goes whole"})


class ImportanceWeights(Config):
    """Multiply the policy loss by bounded ratios: TIS (Yao et al. 2025) or IcePop (arXiv:2510.18855)."""

    level: Annotated[
        Literal["token", "sequence"],
        Choices(
            {
                "token": "the ratio of the token: biased, little variance",
                "sequence": "the product over the sequence: unbiased before its bounds, much variance",
            }
        ),
    ] = "token"
    """What the ratio is taken of."""
    upper: AtLeastOne = 2.0
    """Ratios above are set to it (truncation); with `lower`, to 0."""
    lower: AtMostOne | None = None
    """Set: a ratio below it, or above `upper`, becomes 0 (IcePop). Unset: ratios are only truncated."""
    normalize: bool = False
    """Divide by the mean weight of the step's whole batch, over tokens or over sequences as `level` says."""


class RatioRejection(Config):
    """Leave out what has a ratio outside an interval."""

    type: Literal["k1"] = "k1"
    level: Annotated[RejectionLevel, REJECTION_LEVELS] = "geometric"
    """What the ratio is taken of: log-ratios are summed over a sequence, or averaged."""
    upper: AtLeastOne = 1.001
    """Largest ratio that stays."""
    lower: AtMostOne | None = None
    """Smallest ratio that stays; unset takes 1 / upper."""


class SquareRejection(Config):
    """Leave out where half the squared log-ratio is large."""

    type: Literal["k2"] = "k2"
    level: Annotated[Literal["token", "sequence", "geometric", "max"], DIVERGENCE_LEVELS] = "geometric"
    """What the half square is taken of."""
    upper: PositiveFloat = 0.01
    """Largest value that stays, in nats."""


class KlRejection(Config):
    """Leave out where ratio - 1 - log-ratio, an estimate of the KL between the two, is large."""

    type: Literal["k3"] = "k3"
    level: Annotated[Literal["token", "sequence", "geometric", "max"], DIVERGENCE_LEVELS] = "geometric"
    """What the estimate is taken of."""
    upper: PositiveFloat = 0.01
    """Largest value that stays, in nats."""


Rejection = Annotated[RatioRejection | SquareRejection | KlRejection, Field(discriminator="type")]


class RolloutCorrection(Config):
    """Weigh or leave out what rollout and trainer disagree on; what is left out counts in no mean of the update."""

    mode: Annotated[
        Literal["decoupled", "bypass"],
        Choices(
            {
                "decoupled": "the trainer computes the old log-probabilities, and each batch is corrected once by them",
                "bypass": "the rollout engine's are the old log-probabilities, which saves a forward pass",
            }
        ),
    ] = "decoupled"
    """Whose log-probabilities the policy loss holds the policy near to."""
    weights: ImportanceWeights | None = None
    """Importance weights; unset leaves every weight 1."""
    rejections: tuple[Rejection, ...] = ()
    """Rules that tokens and sequences must all pass to be learnt from."""
    veto: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A sequence with a token of a ratio below this is left out whole (1e-4 is usual); unset vetoes nothing."""
