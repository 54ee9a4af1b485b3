"""GRPO for pass@k: only a group's best response counts (Tang et al. 2025, arXiv:2503.19595). Letters as in `ops`."""

from __future__ import annotations

import torch

from rlctl_train.algos.groups import STD_EPS, Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import PassKGrpoConfig


class PassKGrpo:
    """Advantage of a response: what the best of the group's k would lose without it."""

    def __init__(self, config: PassKGrpoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on the tokens of each group's best response, its score less the second best's; 0 elsewhere [S, T].

        Reads `rewards`, `response_mask` and `group`. With `normalize_std` the difference is over the group's standard
        deviation, which divides by n - 1, plus 1e-6. Two equal best scores, and a group of one, give 0.
        """
        groups, values = Groups.of(batch), scores(batch)
        lead = torch.where(groups.is_best(values) & (groups.sizes() > 1), values - groups.runner_up(values), 0.0)
        if self.config.normalize_std:
            lead = lead / (groups.std(values) + STD_EPS)
        return Advantages(on_every_token(lead, batch))
