"""ReMax, REINFORCE with a greedy baseline (Li et al. 2023, arXiv:2310.10505). Letters as in `ops`.

The greedy response is sampled in `rlctl_train.flows.remax`.
"""

from __future__ import annotations

from rlctl_train.algos.ops import Advantages, reward_to_go, select
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import RemaxConfig


class Remax:
    """Advantage of a token: its return less the score of the greedy response to the same prompt."""

    def __init__(self, config: RemaxConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return sum_{u >= t} r_u - b and the sums themselves, [S, T] each.

        Reads `rewards`, `response_mask` and `baseline` [S], the greedy response's score b.
        """
        mask, dtype = batch["response_mask"], batch["rewards"].dtype
        returns = reward_to_go(batch["rewards"], mask)
        advantages = select(returns - batch["baseline"].double()[:, None], mask)
        return Advantages(advantages.to(dtype), returns.to(dtype))
