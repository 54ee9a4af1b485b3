"""The policy gradient without a ratio, as GPG uses it (Chu et al. 2025, arXiv:2504.02546). Letters as in `ops`."""

from __future__ import annotations

from torch import Tensor

from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import GpgLoss


class PolicyGradient:
    """Weigh each token's log-probability by its advantage alone."""

    def __init__(self, config: GpgLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss -A logp and the metrics of each token [S, T] from `advantages` and `response_mask`."""
        mask = batch["response_mask"]
        difference = log_ratio(logp.detach(), batch["old_logp"], mask)
        return -select(batch["advantages"], mask) * select(logp, mask), {"actor/ppo_kl": -difference}
