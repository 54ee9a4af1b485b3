"""GPG, group policy gradient (Chu et al. 2025, arXiv:2504.02546). Letters as in `ops`; its loss is in `gpg_loss`."""

from __future__ import annotations

from rlctl_train.algos.groups import Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import GpgConfig


class Gpg:
    """Advantage of a response: its score less its group's mean, larger where many scores of the batch are 0."""

    def __init__(self, config: GpgConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], alpha (score - group mean) / f_norm with alpha = S / max(1, number of
        scores that are not 0).

        Reads `rewards`, `response_mask` and `group`. A group of one gives 0.
        """
        groups, values = Groups.of(batch), scores(batch)
        alpha = len(values) / max(1, int(values.count_nonzero()))
        return Advantages(on_every_token(alpha * (values - groups.mean(values)) / self.config.f_norm, batch))
