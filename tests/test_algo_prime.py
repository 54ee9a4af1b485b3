"""PRIME: by value, by gradient, by mask, and by cutting the batch differently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.ops import whiten
from rlctl_train.algos.prime import OutcomeObjective, Prime, is_last
from rlctl_train.algos.rloo import Rloo
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import RlooConfig
from rlctl_train.config.prime import PrimeConfig
from tests.algo_support import assert_cuts_change_nothing

S, T, N = 8, 5, 4


def make_batch(fill: float = 0.0) -> tuple[Batch, Tensor]:
    """Return 8 rows in groups of 4, one with gaps and one empty, and the reward model's log-probabilities."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), 0.0

    def column() -> Tensor:
        return torch.where(mask.bool(), torch.randn(S, T, generator=draw, dtype=torch.float64), fill)

    columns = {name: column() for name in ("reward_logp", "ref_logp", "rewards")}
    right = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0], dtype=torch.float64)
    return Batch({"response_mask": mask, "group": torch.arange(S) // N, "correct": right, **columns}), column()


def objective(leaf: Tensor, batch: Batch, counts: ops.Counts) -> tuple[Tensor, dict[str, Tensor]]:
    return OutcomeObjective(PrimeConfig(beta=0.7))(ops.TokenOutputs(logp=leaf), batch, counts)


def numpy_returns(batch: Batch, config: PrimeConfig) -> np.ndarray:
    mask, out = batch["response_mask"].numpy().astype(bool), np.zeros((S, T))
    q = config.beta * (batch["reward_logp"] - batch["ref_logp"]).numpy()
    for group in np.arange(S).reshape(-1, N):
        shared = sum(q[j, mask[j]].mean() if mask[j].any() else 0.0 for j in group) / (N - 1)
        score = {j: batch["rewards"][j].numpy()[mask[j]].sum() for j in group}
        for i in group:
            written = np.flatnonzero(mask[i])
            rewards = [config.process_coef * (q[i, t] * N / (N - 1) - shared) for t in written]
            if len(written):
                others = sum(score[j] for j in group if j != i) / (N - 1)
                rewards[-1] += config.outcome_coef * (score[i] - others)
            for place, t in enumerate(written):
                out[i, t] = sum(rewards[place:])
    return out


@pytest.mark.parametrize("changes", [{}, {"process_coef": 0.0}, {"outcome_coef": 0.0, "beta": 2.0}], ids=str)
def test_returns_and_advantages_equal_their_formula(changes: dict[str, float]) -> None:
    batch, _ = make_batch()
    config = PrimeConfig(**changes)  # type: ignore[arg-type]
    found, mask = Prime(config).advantages(batch), batch["response_mask"].bool()
    assert found.returns is not None
    np.testing.assert_allclose(found.returns.numpy(), numpy_returns(batch, config), atol=1e-12)
    values = found.returns[mask]
    expected = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    torch.testing.assert_close(found.advantages[mask], expected)
    assert not found.advantages[~mask].any()


def test_without_the_reward_model_it_is_rloo_whitened() -> None:
    batch, _ = make_batch()
    found = Prime(PrimeConfig(process_coef=0.0)).advantages(batch).advantages
    rloo = Rloo(RlooConfig(group_size=N)).advantages(batch).advantages
    torch.testing.assert_close(found, whiten(5 * rloo, batch["response_mask"]))


def test_rows_may_come_in_any_order() -> None:
    batch, _ = make_batch()
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1))
    found = Prime(PrimeConfig()).advantages(batch.rows(order)).advantages
    torch.testing.assert_close(found, Prime(PrimeConfig()).advantages(batch).advantages[order])


def test_the_last_token_is_the_last_one_that_the_model_wrote() -> None:
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert is_last(mask).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_the_reward_models_loss_equals_its_formula() -> None:
    batch, logp = make_batch()
    loss, metrics = objective(logp, batch, ops.count(batch["response_mask"]))
    losses, told = [], []
    for i in range(S - 1):  # the last row is empty
        keep = batch["response_mask"][i].bool()
        chance = 1 / (1 + math.exp(-0.7 * (logp[i] - batch["ref_logp"][i])[keep].sum().item()))
        right = batch["correct"][i].item()
        losses.append(-math.log(chance if right else 1 - chance))
        told.append((chance > 0.5) == bool(right))
    assert loss.item() == pytest.approx(np.mean(losses))
    assert metrics["reward_model/accuracy"].item() == pytest.approx(np.mean(told))


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
        made = Prime(PrimeConfig()).advantages(batch)
        results.append([loss, *metrics.values(), leaf.grad, made.advantages, made.returns])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [5, 0, 3]], ids=str)
def test_loss_metrics_and_gradient_do_not_depend_on_the_micro_batches(cut: list[int]) -> None:
    batch, logp = make_batch()
    assert_cuts_change_nothing(objective, logp, batch, ops.count(batch["response_mask"]), cut)


@pytest.mark.parametrize("gap", [-80.0, 80.0])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_extreme_rewards_stay_finite(gap: float, right: float) -> None:
    one = torch.ones(2, 1)
    columns = {"response_mask": one, "ref_logp": 0 * one, "reward_logp": gap * one, "rewards": right * one}
    batch = Batch(columns | {"correct": right * one[:, 0], "group": torch.zeros(2, dtype=torch.long)})
    leaf = (gap * one).requires_grad_()
    loss, _ = objective(leaf, batch, ops.count(one))
    loss.backward()
    assert leaf.grad is not None and torch.isfinite(loss) and torch.isfinite(leaf.grad).all()
    assert not Prime(PrimeConfig()).advantages(batch).advantages.any(), "a group of equals teaches nothing"


def test_a_step_without_any_token_gives_zero() -> None:
    batch, logp = make_batch()
    empty = batch.with_columns(response_mask=torch.zeros(S, T))
    assert objective(logp, empty, ops.count(empty["response_mask"]))[0].item() == 0
    assert not Prime(PrimeConfig()).advantages(empty).advantages.any()
