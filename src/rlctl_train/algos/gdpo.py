"""GDPO, group reward-decoupled normalisation (Liu et al. 2026, arXiv:2601.05242). Letters as in `ops`."""

from __future__ import annotations

import torch

from rlctl_train.algos.groups import Groups
from rlctl_train.algos.ops import Advantages, whiten
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import GdpoConfig

PART = "part/"
"""What the columns [S] of the reward's parts begin with, before the part's name."""


class Gdpo:
    """Advantage of a response: each part of its reward against its group, then weighted, added and whitened.

    Parts normalised apart keep their resolution: (right, badly formed) and (wrong, well formed) stay different where
    their sums are equal.
    """

    def __init__(self, config: GdpoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], whiten(sum_k weight_k (s_k - group mean) / (group std + 1e-6)).

        Reads `part/<name>` [S] of every part in the configuration, `response_mask` and `group`; standard deviations
        divide by n - 1, whitening is over all sampled tokens. A group of one adds 0 before whitening.
        """
        groups = Groups.of(batch)
        total = torch.zeros(len(batch), dtype=torch.float64, device=batch["group"].device)
        for name, weight in self.config.parts.items():
            total += weight * groups.normalized(batch[PART + name].double())
        mask = batch["response_mask"]
        whitened = whiten(total[:, None].expand(mask.shape), mask)
        return Advantages(whitened.to(batch["rewards"].dtype))
