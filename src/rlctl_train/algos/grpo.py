"""GRPO, group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300). Letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.ops import Advantages, select
from rlctl_train.batch import Batch
from rlctl_train.config.algo import DapoConfig, GrpoConfig

STD_EPS = 1e-6


class Grpo:
    """Advantage of a response: its score against the other responses to the same prompt."""

    def __init__(self, config: GrpoConfig | DapoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], the score less its group's mean, over the standard deviation.

        Reads `rewards`, `response_mask` and `group`; rows may come in any order. The score is the sum of
        the rewards of the sampled tokens, the standard deviation divides by n - 1, and 1e-6 is added to it.
        Without `normalize_std` the difference stays as it is (Dr.GRPO, arXiv:2503.20783). A group of one
        has no baseline to compare with and gives 0.
        """
        mask = batch["response_mask"]
        # In float64 equal scores differ from their mean by 1e-17 and not by the 1e-8 that 1e-6 would magnify.
        scores = select(batch["rewards"], mask).double().sum(-1)
        centred, std = _against_group(scores, batch["group"])
        values = centred / (std + STD_EPS) if self.config.normalize_std else centred
        return Advantages(select(values.to(batch["rewards"].dtype)[:, None].expand_as(mask), mask))


def _against_group(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return each score [S] less its group's mean, and the group's standard deviation (alone: 0)."""
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)

    def group_sum(values: Tensor) -> Tensor:
        return torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add(0, index, values)

    centred = scores - (group_sum(scores) / sizes)[index]
    variance = group_sum(centred.square()) / (sizes - 1).clamp(min=1)
    return centred, variance.sqrt()[index]
