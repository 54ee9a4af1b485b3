"""What losses of pairs share: the margin of a chosen over a rejected response, and its gradient. Letters as in `ops`.

The loss of a pair depends on both responses at once, which may lie in different micro-batches or on different ranks.
So the margins of the whole mini-batch are taken first; by the chain rule the gradient is then linear in the
log-probabilities, and each response brings its own part.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from rlctl_train.algos.covariance import alone
from rlctl_train.algos.objective import Gather, WholeBatchLoss
from rlctl_train.algos.ops import select
from rlctl_train.batch import Batch


class PairLoss(WholeBatchLoss):
    """The mean, over pairs of unequal scores, of a function of their margin.

    With lp the log-probability of a response under the policy and ref that under the reference, both summed over its
    sampled tokens, the margin is (lp_chosen - ref_chosen) - (lp_rejected - ref_rejected). A pair of equal scores is
    left out, of the denominator too. That holds with the aggregation `seq-mean-token-sum`.
    """

    columns: ClassVar[tuple[str, ...]] = ("pair_loss", "pair_margin", "pair_slope")

    @abstractmethod
    def of(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and derivative at each margin, in nats."""

    def statistics(self, logp: Tensor, batch: Batch, gather: Gather) -> dict[str, Tensor]:
        """Return of each sequence its pair's `pair_margin`, its share `pair_loss` of the loss, and `pair_slope`, [S].

        The slope is the loss's derivative in the sequence's log-probability. Both are as many times as large as there
        are sequences for one pair of unequal scores in the mini-batch. Reads `group`, `ref_logp`, `response_mask` and
        `advantages`, which are positive for the chosen response, negative for the rejected one and 0 for equal ones.
        """
        mask = batch["response_mask"]
        side = select(batch["advantages"], mask).double().sum(-1).sign()
        gap = select(logp - batch["ref_logp"], mask).double().sum(-1)
        own = torch.stack([batch["group"].double(), side, gap, mask.bool().any(-1).double()], -1)
        every = gather(own)
        names, pair = torch.unique(every[:, 0], return_inverse=True)
        side_of, gap_of, has_tokens = every[:, 1:].T
        sums = torch.stack([side_of * gap_of, side_of.abs(), has_tokens], -1)
        margin, decided, num_members = sums.new_zeros(len(names), 3).index_add(0, pair, sums).T
        decided = decided > 0
        weight = decided * num_members.sum() / decided.sum().clamp(min=1)
        loss, derivative = self.of(margin)
        mine = torch.searchsorted(names, own[:, 0].contiguous())
        columns = {
            "pair_margin": margin[mine],
            "pair_loss": (weight * loss / num_members.clamp(min=1))[mine],
            "pair_slope": side * (weight * derivative)[mine],
        }
        return {name: column.to(logp.dtype) for name, column in columns.items()}

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token [S, T] from the columns of `statistics`, and what those are made from.

        The tokens of a response share its part of the loss evenly. A batch without these columns is taken for the whole
        mini-batch.
        """
        if "pair_slope" not in batch:
            batch = batch.with_columns(**self.statistics(logp.detach(), batch, alone))
        mask = batch["response_mask"]
        logp = select(logp, mask)
        value = batch["pair_loss"] / mask.bool().sum(-1).clamp(min=1)
        loss = value[:, None] + batch["pair_slope"][:, None] * (logp - logp.detach())
        margin, zero = batch["pair_margin"][:, None], torch.zeros_like(logp)
        metrics = {
            "actor/pair_margin": zero + margin,
            "actor/pair_right": zero + (margin > 0),
            "actor/pair_tied": (select(batch["advantages"], mask) == 0).to(logp.dtype),
        }
        return loss, metrics
