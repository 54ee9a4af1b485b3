"""IPO, identity preference optimisation (Azar et al. 2023, arXiv:2310.12036), on pairs the policy itself sampled."""

from __future__ import annotations

from torch import Tensor

from rlctl_train.algos.pairs import PairLoss
from rlctl_train.config.losses import IpoLoss


class Ipo(PairLoss):
    """Fit the margin to a constant, past which a preference pulls no further."""

    def __init__(self, config: IpoLoss) -> None:
        self.config = config

    def of(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """Return (margin - 1 / (2 beta))^2."""
        distance = margin - 0.5 / self.config.beta
        return distance.square(), 2 * distance
