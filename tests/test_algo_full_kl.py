"""The KL over the whole vocabulary in the loss: by value, gradient and mask, and by cutting the batch differently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.clip import Clip
from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.policy import KlEstimator
from rlctl_train.engines.logits import token_logprobs_and_kl
from tests.algo_support import assert_cuts_change_nothing

S, T, V = 8, 5, 7
TEMPERATURE, COEF = 0.7, 0.3


def make_batch(fill: float = 0.0) -> tuple[Batch, Tensor]:
    """Return 8 rows, one with a gap and one empty, and the logits of the current policy [S, T, V]."""
    draw = torch.Generator().manual_seed(9)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), 0.0

    def column(*more: int) -> Tensor:
        values = torch.randn(S, T, *more, generator=draw, dtype=torch.float64)
        return torch.where(mask.bool().view(S, T, *(1 for _ in more)), values, fill)

    columns = {"old_logp": -column().abs(), "advantages": column(), "ref_full_logp": column(V).log_softmax(-1)}
    ids = torch.randint(0, V, (S, T), generator=draw)
    return Batch({"response_mask": mask, "response_ids": ids, **columns}), column(V)


def outputs(logits: Tensor, batch: Batch) -> ops.TokenOutputs:
    """Return what a model of these logits answers: hidden states that are logits, under an output of ones."""
    head = torch.eye(V, dtype=logits.dtype)
    flat = logits.flatten(0, 1), head, None, batch["response_ids"].flatten(), TEMPERATURE, 4
    answers = token_logprobs_and_kl(*flat, batch["ref_full_logp"].flatten(0, 1))
    logp, entropy, kl = (answer.view(batch["response_ids"].shape) for answer in answers)
    return ops.TokenOutputs(logp=logp, entropy=entropy, ref_kl=kl)


def objective(logits: Tensor, batch: Batch, counts: ops.Counts) -> tuple[Tensor, dict[str, Tensor]]:
    config = GrpoConfig(kl_loss_coef=COEF, kl_loss_estimator="full", aggregation="seq-mean-token-mean")
    return PolicyObjective(Clip(config.loss), config, T)(outputs(logits, batch), batch, counts)


def test_the_kl_in_the_loss_equals_its_formula() -> None:
    batch, logits = make_batch()
    loss, metrics = objective(logits, batch, ops.count(batch["response_mask"]))
    z, log_q, mask = logits.numpy() / TEMPERATURE, batch["ref_full_logp"].numpy(), batch["response_mask"].numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    kl = (p * (np.log(p) - log_q)).sum(-1)
    expected = np.mean([kl[i][mask[i] > 0].mean() for i in range(S) if mask[i].any()])
    assert metrics["actor/kl_loss"].item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx(metrics["actor/pg_loss"].item() + COEF * expected)


def test_gradients_equal_finite_differences() -> None:
    batch, logits = make_batch()
    counts = ops.count(batch["response_mask"])
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, counts)[0], (logits.requires_grad_(),))


def test_nan_under_the_mask_changes_nothing() -> None:
    results = []
    for fill in (0.0, math.nan):
        batch, logits = make_batch(fill)
        made = outputs(logits, batch)
        assert made.ref_kl is not None
        leaf = made.ref_kl.requires_grad_()
        config = GrpoConfig(kl_loss_coef=COEF, kl_loss_estimator="full")
        counts = ops.count(batch["response_mask"])
        loss, metrics = PolicyObjective(Clip(config.loss), config, T)(made, batch, counts)
        loss.backward()
        results.append([loss, *metrics.values(), leaf.grad])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [5, 0, 3]], ids=str)
def test_loss_metrics_and_gradient_do_not_depend_on_the_micro_batches(cut: list[int]) -> None:
    batch, logits = make_batch()
    assert_cuts_change_nothing(objective, logits, batch, ops.count(batch["response_mask"]), cut)


def test_a_policy_that_is_its_reference_is_not_moved() -> None:
    batch, logits = make_batch()
    same = batch.with_columns(ref_full_logp=(logits / TEMPERATURE).log_softmax(-1))
    leaf = logits.requires_grad_()
    kl = outputs(leaf, same).ref_kl
    assert kl is not None and not kl.any()
    kl.sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_it_is_what_the_unbiased_estimators_mean(estimator: KlEstimator) -> None:
    draw, num_samples = torch.Generator().manual_seed(2), 200_000
    log_p, log_q = (torch.randn(V, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    zero = torch.zeros(1, dtype=torch.long)
    kl = token_logprobs_and_kl(log_p[None], torch.eye(V, dtype=torch.float64), None, zero, 1.0, 1, log_q[None])[
        2
    ].item()
    drawn = log_p.exp().multinomial(num_samples, replacement=True, generator=draw)
    estimates = ops.kl_estimate(log_p[drawn], log_q[drawn], estimator)
    error = estimates.std().item() / math.sqrt(num_samples)
    assert kl > 100 * error and abs(estimates.mean().item() - kl) < 4 * error


@pytest.mark.parametrize("gap", [-80.0, 80.0])
def test_extreme_disagreement_stays_finite(gap: float) -> None:
    leaf = torch.zeros(1, V).index_fill(1, torch.tensor([0]), gap).requires_grad_()
    ref = torch.zeros(1, V).index_fill(1, torch.tensor([1]), gap).log_softmax(-1)
    *_, kl = token_logprobs_and_kl(leaf, torch.eye(V), None, torch.zeros(1, dtype=torch.long), 1.0, 1, ref)
    kl.sum().backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    assert kl.item() == pytest.approx(80.0 if gap > 0 else 80.0 / (V - 1), rel=1e-5)
