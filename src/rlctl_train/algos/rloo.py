"""RLOO, REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740). Letters as in `ops`."""

from __future__ import annotations

from rlctl_train.algos.groups import Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import RlooConfig


class Rloo:
    """Advantage of a response: its score less the mean score of the others to the same prompt."""

    def __init__(self, config: RlooConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], n/(n - 1) (score - group mean), which is score - mean of the other n - 1.

        Reads `rewards`, `response_mask` and `group`. A group of one has no others and gives 0.
        """
        groups, values = Groups.of(batch), scores(batch)
        sizes = groups.sizes()
        return Advantages(on_every_token((values - groups.mean(values)) * sizes / (sizes - 1).clamp(min=1), batch))
