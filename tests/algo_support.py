"""What every algorithm's tests ask in the same words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlctl_train.algos.ops import Counts
from rlctl_train.batch import Batch

Objective = Callable[[Tensor, Batch, Counts], tuple[Tensor, dict[str, Tensor]]]


def assert_cuts_change_nothing(
    objective: Objective, logp: Tensor, batch: Batch, counts: Counts, cut: list[int]
) -> None:
    """Assert that micro-batches of `cut` shuffled rows give the loss, metrics and gradient of the whole batch."""
    whole = logp.clone().requires_grad_()
    loss, metrics = objective(whole, batch, counts)
    loss.backward()
    leaf, total, sums = logp.clone().requires_grad_(), 0.0, dict.fromkeys(metrics, 0.0)
    for rows in torch.randperm(len(batch), generator=torch.Generator().manual_seed(2)).split(cut):
        share, part = objective(leaf[rows], batch.rows(rows), counts)
        share.backward()
        total += share.item()
        sums = {key: sums[key] + value.item() for key, value in part.items()}
    torch.testing.assert_close(leaf.grad, whole.grad)
    assert total == pytest.approx(loss.item())
    assert sums == pytest.approx({key: value.item() for key, value in metrics.items()}, abs=1e-12)
