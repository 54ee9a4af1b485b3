"""OPO, on-policy optimisation with the optimal baseline (Hao et al. 2025, arXiv:2505.23585). Letters as in `ops`."""

from __future__ import annotations

from rlctl_train.algos.groups import Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import OpoConfig


class Opo:
    """Advantage of a response: its score less the baseline of least variance.

    That baseline weighs scores by the squared norm of their gradient, which the paper takes to grow as the length.
    """

    def __init__(self, config: OpoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], score - sum_j len_j score_j / sum_j len_j over the group.

        Reads `rewards`, `response_mask` and `group`; len is the number of sampled tokens. A group of one gives 0.
        """
        groups, values = Groups.of(batch), scores(batch)
        lengths = batch["response_mask"].bool().sum(-1).double()
        baseline = groups.sum(lengths * values) / groups.sum(lengths).clamp(min=1)
        return Advantages(on_every_token(values - baseline, batch))
