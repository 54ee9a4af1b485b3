"""GMPO, geometric-mean policy optimisation (Zhao et al. 2025, arXiv:2507.20673). Letters as in `ops`.

The paper averages over sequences: `aggregation = "seq-mean-token-mean"`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import MAX_LOG_RATIO, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import GmpoLoss


class Gmpo:
    """Weigh a sequence by the geometric mean of its clipped token ratios, which one outlier hardly moves."""

    def __init__(self, config: GmpoLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        The log-ratio d of a token is clipped to [-clip_low, clip_high] on the side that would raise the objective:
        s min(s d, s clip(d)), with s the sign of A. R is the exp of its mean over a sequence, and -mean(A) R is the
        loss of each of the sequence's tokens, so that the mean over tokens is the sequence's loss.
        """
        config, mask = self.config, batch["response_mask"]
        advantages = select(batch["advantages"], mask)
        difference = select(logp - batch["old_logp"], mask)
        sign = advantages.sign()
        held = difference.clamp(-config.clip_low, config.clip_high)
        kept = sign * torch.minimum(sign * difference, sign * held)
        num_tokens = mask.bool().sum(-1, keepdim=True).clamp(min=1)
        ratio = (kept.sum(-1, keepdim=True) / num_tokens).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        loss = -advantages.sum(-1, keepdim=True) / num_tokens * ratio
        clipped = sign * difference > sign * held
        metrics = {"actor/pg_clipfrac": clipped.to(logp.dtype), "actor/ppo_kl": -difference.detach()}
        return select(loss.expand_as(mask), mask), metrics
