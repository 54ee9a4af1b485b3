"""SPIN, self-play fine-tuning (Chen et al. 2024, arXiv:2401.01335) on pairs a reward judges. Letters as in `ops`.

The losses of pairs are in `dpo` and `ipo`, the reference is refreshed in `rlctl_train.flows.spin`.
"""

from __future__ import annotations

from rlctl_train.algos.groups import Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.preference import SpinConfig


class Spin:
    """Of the two responses to a prompt, the one of higher score is chosen."""

    def __init__(self, config: SpinConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], 1 for the chosen response, -1 for the rejected one, 0 where scores are equal.

        Reads `rewards`, `response_mask` and `group`.
        """
        values = scores(batch)
        return Advantages(on_every_token((values - Groups.of(batch).mean(values)).sign(), batch))
