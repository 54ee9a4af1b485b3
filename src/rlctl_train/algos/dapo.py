"""DAPO, decoupled clip and dynamic sampling (Yu et al. 2025, arXiv:2503.14476). Letters as in `ops`.

The advantage is GRPO's, the loss the clipped one with a higher upper clip, averaged over tokens. The sampling is in
`rlctl_train.flows.dapo`; the penalty on length is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl_train.algos.grpo import Grpo
from rlctl_train.batch import Batch
from rlctl_train.config.algo import DapoConfig

DEFAULT_BUFFER_SHARE = 1 / 5
"""The paper's 4,096 of 20,480 tokens."""


class Dapo(Grpo):
    """Advantage of a response: its score, less a penalty on length, against the other responses to the prompt."""


@dataclass(frozen=True)
class OverlongPenalty:
    """The paper's soft punishment of overlong responses (its equation 13)."""

    max_tokens: int
    buffer_tokens: int
    penalty: float

    def of(self, lengths: Tensor) -> Tensor:
        """Return what is taken off the reward of responses of these lengths [S]: nothing up to `max_tokens` less
        `buffer_tokens`, from there on evenly more, at `max_tokens` all of `penalty`."""
        over = lengths - (self.max_tokens - self.buffer_tokens)
        return self.penalty * (over / self.buffer_tokens).clamp(0, 1)

    def apply(self, batch: Batch) -> tuple[Tensor, float]:
        """Return `rewards` [S, T], less the penalty at each response's last token, and the mean penalty."""
        lengths = batch["response_len"]
        taken = self.of(lengths).to(batch["rewards"].dtype)
        rewards = batch["rewards"].clone()
        rewards[torch.arange(len(lengths)), lengths - 1] -= taken
        return rewards, float(taken.mean())


def overlong_penalty(config: DapoConfig, max_response_tokens: int) -> OverlongPenalty | None:
    """Return the penalty that the configuration asks for; None where it is turned off."""
    if config.overlong_penalty == 0:
        return None
    buffer = config.overlong_buffer_tokens or max(1, round(DEFAULT_BUFFER_SHARE * max_response_tokens))
    return OverlongPenalty(max_response_tokens, buffer, config.overlong_penalty)
