"""Kl-cov: keep entropy up by holding a few tokens back (Cui et al. 2025, arXiv:2505.22617). Letters as in `ops`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlctl_train.algos.covariance import alone, covariances, highest
from rlctl_train.algos.objective import Gather, WholeBatchLoss
from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import KlCovLoss


class KlCov(WholeBatchLoss):
    """The unclipped loss, with a KL penalty on the tokens of the highest covariance."""

    columns: ClassVar[tuple[str, ...]] = ("chosen",)

    def __init__(self, config: KlCovLoss) -> None:
        self.config = config

    def statistics(self, logp: Tensor, batch: Batch, gather: Gather) -> dict[str, Tensor]:
        """Return `chosen` [S, T], true at the tokens to penalise: the `token_share` of highest covariance.

        Their number is rounded down and at least one; among equal covariances chance chooses.
        """
        covariance, num_tokens = covariances(logp, batch, gather)
        num = max(int(self.config.token_share * num_tokens), 1)
        mask = batch["response_mask"].bool()
        return {"chosen": highest(covariance, mask, num, batch, gather)}

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages`, `response_mask` and `chosen`.

        With ratio r the loss is -A r, and where chosen `coef` |logp - old_logp| more. A batch without `chosen` is taken
        for the whole mini-batch.
        """
        if "chosen" not in batch:
            batch = batch.with_columns(**self.statistics(logp.detach(), batch, alone))
        chosen, mask = batch["chosen"], batch["response_mask"]
        ratio = log_ratio(logp, batch["old_logp"], mask).exp()
        difference = select(logp - batch["old_logp"], mask)
        penalty = torch.where(chosen, self.config.coef * difference.abs(), 0.0)
        metrics = {"actor/pg_covfrac": chosen.to(logp.dtype), "actor/ppo_kl": -difference.detach()}
        return -select(batch["advantages"], mask) * ratio + penalty, metrics
