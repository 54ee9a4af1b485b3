"""PPO with a learned critic (Schulman et al. 2017, arXiv:1707.06347). Letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import Advantages, select, whiten
from rlctl_train.batch import Batch
from rlctl_train.config.actor_critic import PpoConfig


class Ppo:
    """Advantage of a token: generalised advantage estimation against the critic's values."""

    def __init__(self, config: PpoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return whitened advantages and the critic's targets, [S, T].

        Reads `rewards`, `values` and `response_mask`. The targets are advantage plus value before
        whitening, which is over all sampled tokens of the batch.
        """
        mask = batch["response_mask"]
        values = select(batch["values"], mask)
        raw = gae(select(batch["rewards"], mask), values, mask, gamma=self.config.gamma, lam=self.config.lam)
        return Advantages(whiten(raw, mask), raw + values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> Tensor:
    """Return generalised advantage estimates [S, T] (arXiv:1506.02438), 0 where the mask is 0.

    delta_t = r_t + gamma V_next - V_t and A_t = delta_t + gamma lam A_next, backwards from 0 past the last
    token; lam may differ between sequences, [S]. "Next" is the next token the model wrote: a tool's reply in
    between is carried over and costs no discount.
    """
    # The numbers of one token lie together.
    rewards, values, written = (x.t().contiguous() for x in (rewards, values, mask.bool()))
    next_value = next_advantage = torch.zeros_like(values[0])
    advantages = torch.zeros_like(values)
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(written[t], values[t], next_value)
        next_advantage = torch.where(written[t], advantage, next_advantage)
        advantages[t] = next_advantage
    return select(advantages.t(), mask)
