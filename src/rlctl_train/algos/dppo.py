"""DPPO, divergence proximal policy optimisation (Qi et al. 2026, arXiv:2602.04879). Letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import DppoLoss

THRESHOLDS = {"tv": 0.15, "kl": 0.05}
"""The authors' setting for both directions; that of `kl` in nats."""
EPS = 1e-8
"""Added to the probability of all other tokens before its logarithm."""


class Dppo:
    """Leave out a token once its probability, and not its ratio, has moved far the way its advantage pushes it."""

    def __init__(self, config: DppoLoss) -> None:
        self.config = config
        self.low = config.threshold_low or THRESHOLDS[config.variant]
        self.high = config.threshold_high or THRESHOLDS[config.variant]

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        With ratio r the loss is -k w A logp with the constant weight w = min(r, max_ratio), and k = 0 for a token
        that is left out: with A > 0 where it grew by more than `threshold_high`, else where it fell by more than
        `threshold_low`, measured by `variant`.
        """
        mask = batch["response_mask"]
        advantages, logp = select(batch["advantages"], mask), select(logp, mask)
        difference = log_ratio(logp.detach(), batch["old_logp"], mask)
        ratio = difference.exp()
        rise = self._rise(logp.detach(), select(batch["old_logp"], mask))
        kept = torch.where(advantages > 0, rise <= self.high, rise >= -self.low)
        weight = torch.where(kept, ratio.clamp(max=self.config.max_ratio), 0.0)
        metrics = {
            "actor/pg_clipfrac": (~kept).to(logp.dtype),
            "actor/pg_clipfrac_lower": (kept & (ratio > self.config.max_ratio)).to(logp.dtype),
            "actor/ppo_kl": -difference,
        }
        return -weight * advantages * logp, metrics

    def _rise(self, logp: Tensor, old_logp: Tensor) -> Tensor:
        """Return how far each token's probability grew [S, T]; negative where it fell."""
        now, before = logp.exp(), old_logp.exp()
        if self.config.variant == "tv":
            return now - before
        others = ((1 - before + EPS) / (1 - now + EPS)).log()
        divergence = before * (old_logp - logp) + (1 - before) * others
        return torch.where(now > before, divergence, -divergence)
