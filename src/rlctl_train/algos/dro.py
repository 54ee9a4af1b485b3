"""DRO, direct reward optimisation with the advantage as reward (Richemond et al. 2024, arXiv:2405.19107).

Letters as in `ops`.
"""

from __future__ import annotations

from torch import Tensor

from rlctl_train.algos.ops import select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import DroLoss


class Dro:
    """Follow the policy gradient and pull each log-probability back to the old policy's."""

    def __init__(self, config: DroLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        The loss is -(A logp - beta / 2 (logp - old_logp)^2).
        """
        mask = batch["response_mask"]
        logp = select(logp, mask)
        difference = select(logp - batch["old_logp"], mask)
        loss = -select(batch["advantages"], mask) * logp + 0.5 * self.config.beta * difference.square()
        return loss, {"actor/ppo_kl": -difference.detach()}
