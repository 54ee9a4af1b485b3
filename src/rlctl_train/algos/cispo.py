"""CISPO, the loss of MiniMax-M1 (MiniMax 2025, arXiv:2506.13585). Letters as in `ops`."""

from __future__ import annotations

from torch import Tensor

from rlctl_train.algos.ops import log_ratio, select
from rlctl_train.batch import Batch
from rlctl_train.config.losses import CispoLoss


class Cispo:
    """Clip the importance weight of a token and not its gradient: no token is left out."""

    def __init__(self, config: CispoLoss) -> None:
        self.config = config

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from `old_logp`, `advantages` and `response_mask`.

        With ratio r the loss is -w A logp with the constant weight w = clip(r, 1 - clip_low, 1 + clip_high).
        """
        config, mask = self.config, batch["response_mask"]
        difference = log_ratio(logp.detach(), batch["old_logp"], mask)
        ratio = difference.exp()
        weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        metrics = {"actor/pg_clipfrac": (weight != ratio).to(logp.dtype), "actor/ppo_kl": -difference}
        return -weight * select(batch["advantages"], mask) * select(logp, mask), metrics
