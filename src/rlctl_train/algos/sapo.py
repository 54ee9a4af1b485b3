"""SAPO, soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347). Letters as in `ops`.

The paper averages each sequence's tokens, then sequences: `aggregation = "seq-mean-token-mean"`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import SapoLoss


class Sapo:
    """Let the gradient fade as the probability ratio leaves 1, instead of cutting it off."""

    def __init__(self, config: SapoLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        With ratio r the loss is -A sigmoid(tau (r - 1)) 4 / tau, tau being `tau_pos` where A > 0 and `tau_neg`
        elsewhere. At r = 1 its slope is that of -A r.
        """
        mask = batch["response_mask"]
        advantages = select(batch["advantages"], mask)
        difference = log_ratio(logp, batch["old_logp"], mask)
        tau = torch.where(advantages > 0, self.config.tau_pos, self.config.tau_neg).to(logp.dtype)
        gate = torch.sigmoid(tau * (difference.exp() - 1)) * 4 / tau
        return -advantages * gate, {"actor/ppo_kl": -difference.detach()}
