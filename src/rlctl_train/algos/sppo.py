"""SPPO, self-play preference optimisation (Wu et al. 2024, arXiv:2405.00675). Letters as in `ops`."""

from __future__ import annotations

import math

from torch import Tensor

from rlctl_train.algos.groups import on_every_token, scores
from rlctl_train.algos.ops import Advantages
from rlctl_train.batch import Batch
from rlctl_train.config.preference import SppoConfig


class Sppo:
    """Advantage of a response: the log-ratio to the old policy that it should get, in nats."""

    def __init__(self, config: SppoConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], eta (score - b) with b the soft mean of all scores of the batch.

        Reads `rewards` and `response_mask`.
        """
        values, eta = scores(batch), self.config.eta
        return Advantages(on_every_token(eta * (values - softmean(values, eta)), batch))


def softmean(values: Tensor, eta: float) -> Tensor:
    """Return log(mean exp(eta values)) / eta of values [S]; with eta 0 its limit, their mean."""
    if eta == 0:
        return values.mean()
    return ((eta * values).logsumexp(0) - math.log(len(values))) / eta
