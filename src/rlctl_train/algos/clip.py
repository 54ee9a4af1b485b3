"""The clipped policy loss of PPO with dual clip (arXiv:1707.06347, arXiv:1912.09729). Letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import ClipLoss


class Clip:
    """Hold the probability ratio near 1."""

    def __init__(self, config: ClipLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        With ratio r = exp(logp - old_logp) and advantage A the loss is max(-A r, -A clip(r, 1 - clip_low, 1 +
        clip_high)); where A < 0 it is held below -A dual_clip, past which a token that grew too likely gives no
        gradient.
        """
        config, mask = self.config, batch["response_mask"]
        advantages = select(batch["advantages"], mask)
        difference = log_ratio(logp, batch["old_logp"], mask)
        ratio = difference.exp()
        free = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = torch.maximum(free, clipped)
        metrics = {"actor/pg_clipfrac": clipped > free, "actor/ppo_kl": -difference}
        if config.dual_clip is not None:
            bound = -advantages * config.dual_clip
            over = (advantages < 0) & (loss > bound)
            loss = torch.where(over, bound, loss)
            metrics["actor/pg_clipfrac_lower"] = over
        return loss, {name: value.detach().to(loss.dtype) for name, value in metrics.items()}
