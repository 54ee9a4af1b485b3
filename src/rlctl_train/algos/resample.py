"""PF-PPO: which responses PPO learns from (Shen et al. 2024, arXiv:2409.06957). Letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.config.actor_critic import MaxMinResample, MaxRandomResample, PowResample

BEST_CHANCE, OTHER_CHANCE = 0.4, 0.1
"""Relative chances of `max_random`."""
LEAST_CHANCE = 1e-8
"""Added to every chance, so that there is always something to draw."""

Resample = PowResample | MaxMinResample | MaxRandomResample


def chances(scores: Tensor, config: Resample) -> Tensor:
    """Return the relative chance of each response to be drawn [S], from its score [S].

    pow         |score|^power
    max_min     1 for the highest and the lowest score of the batch, 0 for the others
    max_random  0.4 for the highest score of the batch, 0.1 for the others
    """
    scores = scores.double()
    match config:
        case PowResample():
            weights = scores.abs().pow(config.power)
        case MaxMinResample():
            weights = ((scores == scores.max()) | (scores == scores.min())).double()
        case MaxRandomResample():
            weights = torch.where(scores == scores.max(), BEST_CHANCE, OTHER_CHANCE)
    return weights + LEAST_CHANCE


def draw(scores: Tensor, config: Resample, seed: int) -> list[int]:
    """Return S rows drawn with replacement by `chances`; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return chances(scores, config).multinomial(len(scores), replacement=True, generator=generator).tolist()
