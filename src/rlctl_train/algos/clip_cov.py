"""Clip-cov: keep entropy up by leaving out a few tokens (Cui et al. 2025, arXiv:2505.22617). Letters as in `ops`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rlctl_train.algos.covariance import alone, covariances, highest
from rlctl_train.algos.objective import Gather, WholeBatchLoss
from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import ClipCovLoss


class ClipCov(WholeBatchLoss):
    """The clipped loss, without those tokens that chance picks among the ones of high covariance."""

    columns: ClassVar[tuple[str, ...]] = ("chosen",)

    def __init__(self, config: ClipCovLoss) -> None:
        self.config = config

    def statistics(self, logp: Tensor, batch: Batch, gather: Gather) -> dict[str, Tensor]:
        """Return `chosen` [S, T], true at the tokens to leave out.

        Candidates have a covariance between `cov_low` and `cov_high`, and their ratio is not clipped; `token_share` of
        the mini-batch's tokens are drawn from them, rounded down, at least one.
        """
        config, mask = self.config, batch["response_mask"].bool()
        covariance, num_tokens = covariances(logp, batch, gather)
        free, clipped, _ = self._sides(logp, batch)
        within = (covariance > config.cov_low) & (covariance < config.cov_high)
        num = max(int(config.token_share * num_tokens), 1)
        alike = torch.zeros_like(covariance)
        return {"chosen": highest(alike, mask & within & (clipped <= free), num, batch, gather)}

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages`, `response_mask` and `chosen`.

        With ratio r the loss is max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and 0 where chosen. A batch without
        `chosen` is taken for the whole mini-batch.
        """
        if "chosen" not in batch:
            batch = batch.with_columns(**self.statistics(logp.detach(), batch, alone))
        chosen = batch["chosen"]
        free, clipped, difference = self._sides(logp, batch)
        metrics = {
            "actor/pg_clipfrac": (clipped > free).to(logp.dtype),
            "actor/pg_covfrac": chosen.to(logp.dtype),
            "actor/ppo_kl": -difference.detach(),
        }
        return torch.where(chosen, 0.0, torch.maximum(free, clipped)), metrics

    def _sides(self, logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return free and clipped loss, and the log-ratio, [S, T] each."""
        advantages = select(batch["advantages"], batch["response_mask"])
        difference = log_ratio(logp, batch["old_logp"], batch["response_mask"])
        ratio = difference.exp()
        held = ratio.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return -advantages * ratio, -advantages * held, difference
