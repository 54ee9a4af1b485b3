"""On-policy distillation: by value, by gradient, by mask, and by cutting the batch differently."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.clip import Clip
from rlctl_train.algos.distill import Distill, top_k_kl
from rlctl_train.algos.grpo import Grpo
from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.distill import DistillConfig, SampledSignal, TopKSignal
from rlctl_train.config.losses import ClipLoss
from tests.algo_support import assert_cuts_change_nothing

S, T, K = 8, 5, 3


def config(**changes: Any) -> DistillConfig:
    return DistillConfig(teacher_path="teacher", **changes)


def make_batch(fill: float = 0.0) -> tuple[Batch, Tensor]:
    """Return 8 rows in groups of 2, one with a gap and one empty, and the student's log-probabilities [S, T, K]."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), 0.0

    def column(*more: int) -> Tensor:
        values = -torch.randn(S, T, *more, generator=draw, dtype=torch.float64).abs()
        return torch.where(mask.bool().view(S, T, *(1 for _ in more)), values, fill)

    names = ("old_logp", "teacher_logp", "rewards", "advantages")
    columns = {name: column() for name in names} | {"teacher_top_logp": column(K) - 1.0}
    return Batch({"response_mask": mask, "group": torch.arange(S) // 2, **columns}), column(K)


def objective(leaf: Tensor, batch: Batch, counts: ops.Counts) -> tuple[Tensor, dict[str, Tensor]]:
    made = config(signal=TopKSignal(k=K), coef=0.7, aggregation="seq-mean-token-mean")
    outputs = ops.TokenOutputs(logp=leaf[..., 0], top_logp=leaf)
    return PolicyObjective(Clip(ClipLoss()), made, T)(outputs, batch, counts)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_advantage_of_a_token_equals_its_formula(gamma: float) -> None:
    batch, _ = make_batch()
    found = Distill(config(signal=SampledSignal(gamma=gamma), coef=0.5)).advantages(batch).advantages
    mask, gap = batch["response_mask"].numpy(), (batch["teacher_logp"] - batch["old_logp"]).numpy()
    for i in range(S):
        written = np.flatnonzero(mask[i])
        for place, t in enumerate(written):
            later = [gamma**n * gap[i, u] for n, u in enumerate(written[place:])]
            assert found[i, t].item() == pytest.approx(0.5 * sum(later), abs=1e-12)
    assert (found[batch["response_mask"] == 0] == 0).all()


def test_the_tasks_part_is_grpos_advantage() -> None:
    batch, _ = make_batch()
    mixed = Distill(config(task_coef=2.0, group_size=2)).advantages(batch).advantages
    alone = Distill(config(group_size=2)).advantages(batch).advantages
    task = Grpo(GrpoConfig(group_size=2)).advantages(batch).advantages
    torch.testing.assert_close(mixed, alone + 2 * task)
    top_k = Distill(config(signal=TopKSignal(), task_coef=2.0, group_size=2)).advantages(batch).advantages
    torch.testing.assert_close(top_k, 2 * task)


def test_a_teacher_of_the_same_mind_teaches_nothing() -> None:
    batch, _ = make_batch()
    agreed = batch.with_columns(teacher_logp=batch["old_logp"])
    assert not Distill(config()).advantages(agreed).advantages.any()


def test_the_divergence_of_a_token_equals_its_formula() -> None:
    batch, logp = make_batch()
    kl, mass = top_k_kl(logp, batch["teacher_top_logp"], batch["response_mask"])
    log_nu = batch["teacher_top_logp"].numpy()
    for i, t in np.argwhere(batch["response_mask"].numpy()):
        expected = sum(math.exp(v) * (v - p) for v, p in zip(log_nu[i, t], logp[i, t].tolist(), strict=True))
        assert kl[i, t].item() == pytest.approx(expected, abs=1e-13)
        assert mass[i, t].item() == pytest.approx(np.exp(log_nu[i, t]).sum())
    assert not kl[batch["response_mask"] == 0].any()


def test_over_the_whole_vocabulary_it_is_the_forward_divergence_and_its_gradient() -> None:
    teacher = torch.randn(1, 1, 7, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(1, 1, 7, dtype=torch.float64, requires_grad=True)
    kl, mass = top_k_kl(logits.log_softmax(-1), teacher, torch.ones(1, 1))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(kl, expected)
    assert mass.item() == pytest.approx(1.0)
    kl.sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - teacher.exp()).detach())


def test_the_loss_is_the_policys_plus_the_divergence() -> None:
    batch, logp = make_batch()
    loss, metrics = objective(logp, batch, ops.count(batch["response_mask"]))
    assert loss.item() == pytest.approx(metrics["actor/pg_loss"].item() + 0.7 * metrics["actor/teacher_kl"].item())


def test_gradients_equal_finite_differences() -> None:
    batch, logp = make_batch()
    counts = ops.count(batch["response_mask"])
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, counts)[0], (logp.requires_grad_(),))


def test_nan_under_the_mask_changes_nothing() -> None:
    results = []
    for fill in (0.0, math.nan):
        batch, logp = make_batch(fill)
        leaf = logp.requires_grad_()
        loss, metrics = objective(leaf, batch, ops.count(batch["response_mask"]))
        loss.backward()
        made = Distill(config(task_coef=1.0, group_size=2)).advantages(batch).advantages
        results.append([loss, *metrics.values(), leaf.grad, made])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [5, 0, 3]], ids=str)
def test_loss_metrics_and_gradient_do_not_depend_on_the_micro_batches(cut: list[int]) -> None:
    batch, logp = make_batch()
    assert_cuts_change_nothing(objective, logp, batch, ops.count(batch["response_mask"]), cut)


@pytest.mark.parametrize("gap", [-80.0, 80.0])
def test_extreme_disagreement_stays_finite(gap: float) -> None:
    one = torch.ones(1, 1)
    leaf = torch.full((1, 1, 2), -max(gap, 0.0), requires_grad=True)
    columns = {"response_mask": one, "old_logp": -one, "teacher_logp": gap - one, "rewards": 0 * one}
    batch = Batch(columns | {"teacher_top_logp": torch.full((1, 1, 2), min(gap, 0.0)), "advantages": 0 * one})
    loss, _ = objective(leaf, batch, ops.count(one))
    loss.backward()
    made = Distill(config()).advantages(batch).advantages
    assert leaf.grad is not None and torch.isfinite(loss) and torch.isfinite(leaf.grad).all()
    assert made.item() == pytest.approx(gap)


def test_a_step_without_any_token_gives_zero() -> None:
    batch, logp = make_batch()
    empty = batch.with_columns(response_mask=torch.zeros(S, T))
    assert objective(logp, empty, ops.count(empty["response_mask"]))[0].item() == 0
