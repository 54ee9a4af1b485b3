"""GSPO, group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071). Letters as in `ops`.

The paper averages each sequence's tokens, then sequences: `aggregation = "seq-mean-token-mean"`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import GspoLoss

MAX_LOG_RATIO = 10.0
"""The log-ratio of a sequence is held below this many nats before `exp`."""


class Gspo:
    """Hold the length-normalised ratio of a whole sequence near 1."""

    def __init__(self, config: GspoLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        With l the mean of logp - old_logp over a sequence's n unmasked tokens, each of them has the ratio s =
        exp(l), to which it contributes the gradient of its own logp, and the loss max(-A s, -A clip(s, 1 -
        clip_low, 1 + clip_high)). This is the paper's GSPO-token: with one advantage a sequence it is GSPO.
        """
        config, mask = self.config, batch["response_mask"]
        advantages, logp = select(batch["advantages"], mask), select(logp, mask)
        difference = select(logp - batch["old_logp"], mask).detach()
        sequence = difference.sum(-1, keepdim=True) / mask.bool().sum(-1, keepdim=True).clamp(min=1)
        ratio = (logp - logp.detach() + sequence).clamp(max=MAX_LOG_RATIO).exp()
        free = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        metrics = {"actor/pg_clipfrac": (clipped > free).to(logp.dtype), "actor/ppo_kl": -difference}
        return torch.maximum(free, clipped), metrics
