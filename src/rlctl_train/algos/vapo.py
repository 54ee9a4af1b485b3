"""VAPO, value-based augmented PPO (Yue et al. 2025, arXiv:2504.05118). Letters as in `ops`.

The clip is DAPO's; the loss on right responses is in `objective`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import Advantages, select, whiten
from rlctl_train.algos.ppo import gae
from rlctl_train.batch import Batch
from rlctl_train.config.actor_critic import VapoConfig


class Vapo:
    """Advantage of a token: generalised advantage estimation, decoupled from the critic's and adapted to length."""

    def __init__(self, config: VapoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return whitened advantages and the critic's targets, [S, T].

        Reads `rewards`, `values` and `response_mask`. The advantages' lambda is 1 - 1/(length_alpha l) for a response
        of l sampled tokens, at least 0, so that the weights of later errors add up to length_alpha l; the targets are
        of lambda `critic_lam`. Whitening is over all sampled tokens of the batch.
        """
        config, mask = self.config, batch["response_mask"]
        values, rewards = select(batch["values"], mask), select(batch["rewards"], mask)
        raw = gae(rewards, values, mask, gamma=config.gamma, lam=self._lam(mask).to(values.dtype))
        returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.critic_lam) + values
        return Advantages(whiten(raw, mask), returns)

    def _lam(self, mask: Tensor) -> Tensor:
        """Return the lambda of each response, [S] in float64."""
        lengths = mask.bool().sum(-1).clamp(min=1).double()
        if self.config.length_alpha is None:
            return torch.full_like(lengths, self.config.lam)
        return (1 - 1 / (self.config.length_alpha * lengths)).clamp(min=0)
