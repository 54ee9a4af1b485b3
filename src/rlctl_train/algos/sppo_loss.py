"""The loss of SPPO (Wu et al. 2024, arXiv:2405.00675). Letters as in `ops`."""

from __future__ import annotations

from torch import Tensor

from rlctl_train.algos.ops import select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import SppoLoss


class SquaredLogRatio:
    """Fit the log-ratio of a whole response to its advantage."""

    def __init__(self, config: SppoLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        The loss of a response is (sum_t logp - sum_t old_logp - A)^2, which its tokens share evenly; its advantage A is
        the same on all of them.
        """
        mask = batch["response_mask"]
        lengths = mask.bool().sum(-1).clamp(min=1)
        difference = select(logp - batch["old_logp"], mask)
        wanted = select(batch["advantages"], mask).sum(-1) / lengths
        loss = (difference.sum(-1) - wanted).square() / lengths
        return loss[:, None].expand_as(mask), {"actor/ppo_kl": -difference.detach()}
