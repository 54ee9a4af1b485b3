"""GRPO, group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300). Letters as in `ops`."""

from __future__ import annotations

from rlctl_train.algos.groups import Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.policy import NormalizedGroup


class Grpo:
    """Advantage of a response: its score against the other responses to the same prompt."""

    def __init__(self, config: NormalizedGroup) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], the score less its group's mean, over the standard deviation.

        Reads `rewards`, `response_mask` and `group`; rows may come in any order. The score is the sum of
        the rewards of the sampled tokens, the standard deviation divides by n - 1, and 1e-6 is added to it.
        Without `normalize_std` the difference stays as it is (Dr.GRPO, arXiv:2503.20783). A group of one
        has no baseline to compare with and gives 0.
        """
        groups, values = Groups.of(batch), scores(batch)
        against = groups.normalized(values) if self.config.normalize_std else values - groups.mean(values)
        return Advantages(on_every_token(against, batch))
