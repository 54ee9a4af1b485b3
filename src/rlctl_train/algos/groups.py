"""Scores of responses and their statistics over groups, the responses to one prompt. Letters as in `ops`.

Scores are in float64: equal ones then differ from their mean by 1e-17, and not by the 1e-8 that dividing by a standard
deviation of 1e-6 would magnify.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl_train.algos.ops import select
from rlctl_train.batch import Batch

STD_EPS = 1e-6
"""Added to a group's standard deviation before something is divided by it."""


def scores(batch: Batch) -> Tensor:
    """Return the sum of `rewards` over the sampled tokens of each response, [S] in float64."""
    return select(batch["rewards"], batch["response_mask"]).double().sum(-1)


def on_every_token(values: Tensor, batch: Batch) -> Tensor:
    """Return values [S] on each sampled token of their response, [S, T] in the rewards' dtype."""
    mask = batch["response_mask"]
    return select(values.to(batch["rewards"].dtype)[:, None].expand_as(mask), mask)


@dataclass(frozen=True)
class Groups:
    """Who belongs together. Every method answers at each sequence [S], rows in any order."""

    index: Tensor
    """Number of each sequence's group, [S]."""
    num_groups: int

    @classmethod
    def of(cls, batch: Batch) -> Groups:
        """Return the groups of `group` [S]."""
        names, index = torch.unique(batch["group"], return_inverse=True)
        return cls(index, len(names))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of values [S, ...] over the group."""
        return values.new_zeros(self.num_groups, *values.shape[1:]).index_add(0, self.index, values)[self.index]

    def sizes(self) -> Tensor:
        """Return how many sequences the group has, in float64."""
        return self.sum(torch.ones_like(self.index, dtype=torch.float64))

    def mean(self, values: Tensor) -> Tensor:
        """Return the group's mean of values [S]."""
        return self.sum(values) / self.sizes()

    def std(self, values: Tensor) -> Tensor:
        """Return the group's standard deviation of values [S], which divides by n - 1; of one alone it is 0."""
        centred = values - self.mean(values)
        return (self.sum(centred.square()) / (self.sizes() - 1).clamp(min=1)).sqrt()

    def normalized(self, values: Tensor) -> Tensor:
        """Return values [S] less the group's mean, over its standard deviation plus 1e-6; of one alone it is 0."""
        return (values - self.mean(values)) / (self.std(values) + STD_EPS)

    def max(self, values: Tensor) -> Tensor:
        """Return the group's largest value."""
        lowest = values.new_full((self.num_groups,), -torch.inf)
        return lowest.scatter_reduce(0, self.index, values, "amax")[self.index]

    def is_best(self, values: Tensor) -> Tensor:
        """Return, as booleans [S], whose value is the group's largest; of several, the first row's."""
        rows = torch.arange(len(values), device=values.device, dtype=torch.float64)
        first = self.max(torch.where(values == self.max(values), -rows, -torch.inf))
        return rows == -first

    def runner_up(self, values: Tensor) -> Tensor:
        """Return the group's largest value beside the best one's; -inf in a group of one."""
        return self.max(torch.where(self.is_best(values), -torch.inf, values))
