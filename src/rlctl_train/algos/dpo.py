"""DPO, direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), on pairs the policy itself sampled."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlctl_train.algos.pairs import PairLoss
from rlctl_train.config.losses import DpoLoss


class Dpo(PairLoss):
    """Make the preference likely, with the implicit reward beta log(pi / pi_ref)."""

    def __init__(self, config: DpoLoss) -> None:
        self.config = config

    def of(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """Return -(1 - e) log sigma(h) - e log sigma(-h) with h = beta margin and e the label smoothing."""
        beta, smoothing = self.config.beta, self.config.label_smoothing
        h = beta * margin
        loss = -(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h)
        return loss, beta * (smoothing * h.sigmoid() - (1 - smoothing) * (-h).sigmoid())
