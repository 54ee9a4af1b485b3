"""Losses of whole responses and pairs (SPIN with DPO or IPO, SPPO): by value, by gradient, by mask, by cutting."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.objective import PolicyObjective, WholeBatchLoss
from rlctl_train.algos.pairs import PairLoss
from rlctl_train.algos.spin import Spin
from rlctl_train.algos.sppo import Sppo
from rlctl_train.batch import Batch
from rlctl_train.config.losses import DpoLoss, IpoLoss
from rlctl_train.config.preference import SpinConfig, SppoConfig
from rlctl_train.registry import LOSSES, load
from tests.algo_support import assert_cuts_change_nothing

S, T = 10, 5
CONFIGS: dict[str, SpinConfig | SppoConfig] = {
    "dpo": SpinConfig(loss=DpoLoss(beta=0.4)),
    "dpo-smoothed": SpinConfig(loss=DpoLoss(beta=0.7, label_smoothing=0.2)),
    "ipo": SpinConfig(loss=IpoLoss(beta=0.3)),
    "sppo": SppoConfig(eta=0.8),
}
PAIRS = ("dpo", "dpo-smoothed", "ipo")


def _batch(config: SpinConfig | SppoConfig, fill: float = 0.0) -> tuple[Batch, Tensor]:
    """Return 5 pairs and current log-probabilities; row 0 has a gap, row 7 is empty, 4 and 5 score the same."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), 0.0

    def column() -> Tensor:
        return torch.where(mask.bool(), torch.randn(S, T, generator=generator, dtype=torch.float64), fill)

    rewards = torch.where(mask.bool(), 0.0, fill).double()
    rewards[:, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.3, fill, 0.5, 2.0])
    numbers = {"group": torch.arange(S) // 2 + 3, "row": torch.arange(S), "policy_version": torch.full((S,), 3)}
    old, ref, moved = -column().abs(), -column().abs(), column()
    batch = Batch({"response_mask": mask, "rewards": rewards, "old_logp": old, "ref_logp": ref, **numbers})
    algo = Spin(config) if isinstance(config, SpinConfig) else Sppo(config)
    return batch.with_columns(advantages=algo.advantages(batch).advantages), old + 0.4 * moved


def _objective(config: SpinConfig | SppoConfig) -> PolicyObjective:
    return PolicyObjective(load(LOSSES, config.loss.type)(config.loss), config, max_response_tokens=T)


def _told(objective: PolicyObjective, logp: Tensor, batch: Batch) -> Batch:
    """Return the batch with what the loss asks to know about all of it."""
    if not objective.needs_statistics:
        return batch
    return batch.with_columns(**objective.statistics(logp.detach(), batch, lambda values: values))


def _loss(config: SpinConfig | SppoConfig, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    objective, counts = _objective(config), ops.count(batch["response_mask"])
    return objective(ops.TokenOutputs(logp=logp), _told(objective, logp, batch), counts)


def _numpy_pairs(config: SpinConfig, logp: Tensor, batch: Batch) -> float:
    mask = batch["response_mask"].numpy()
    gap, scores = (((x * mask).sum(1)) for x in ((logp - batch["ref_logp"]).numpy(), batch["rewards"].numpy()))
    losses = []
    for one, two in zip(range(0, S, 2), range(1, S, 2), strict=True):
        if scores[one] == scores[two]:
            continue
        chosen, rejected = (one, two) if scores[one] > scores[two] else (two, one)
        margin, beta = gap[chosen] - gap[rejected], config.loss.beta
        if isinstance(config.loss, IpoLoss):
            losses.append((margin - 1 / (2 * beta)) ** 2)
        else:
            e, likely = config.loss.label_smoothing, 1 / (1 + math.exp(-beta * margin))
            losses.append(-(1 - e) * math.log(likely) - e * math.log(1 - likely))
    return float(np.mean(losses))


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_is_the_mean_over_pairs_of_unequal_scores(name: str) -> None:
    config = CONFIGS[name]
    assert isinstance(config, SpinConfig)
    batch, logp = _batch(config)
    loss, metrics = _loss(config, logp, batch)
    assert loss.item() == pytest.approx(_numpy_pairs(config, logp, batch), rel=1e-12)
    assert metrics["actor/pg_loss"].item() == pytest.approx(loss.item())


@pytest.mark.parametrize("eta", [0.0, 0.8, 2.0])
def test_sppo_squares_the_distance_of_log_ratio_and_score_less_the_soft_mean(eta: float) -> None:
    config = SppoConfig(eta=eta)
    batch, logp = _batch(config)
    keep = batch["response_mask"].numpy()
    scores = (batch["rewards"].numpy() * keep).sum(1)
    baseline = scores.mean() if eta == 0 else np.log(np.exp(eta * scores).mean()) / eta
    ratios = ((logp - batch["old_logp"]).numpy() * keep).sum(1)
    expected = (ratios - eta * (scores - baseline))[keep.any(1)] ** 2
    assert _loss(config, logp, batch)[0].item() == pytest.approx(expected.mean(), rel=1e-12)


def test_the_soft_mean_lies_between_mean_and_maximum_and_nears_both() -> None:
    batch, _ = _batch(CONFIGS["sppo"])
    rewards = batch["rewards"].sum(1)

    def baseline(eta: float) -> float:
        advantages = Sppo(SppoConfig(eta=eta)).advantages(batch).advantages
        return (rewards[0] - advantages[0, 0] / eta).item()

    assert baseline(1e-6) == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert baseline(1e4) == pytest.approx(rewards.max().item(), abs=1e-3)
    assert rewards.mean() < baseline(1.0) < rewards.max()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_finite_differences(name: str) -> None:
    batch, logp = _batch(CONFIGS[name])
    assert torch.autograd.gradcheck(lambda x: _loss(CONFIGS[name], x, batch)[0], (logp.requires_grad_(),))


@pytest.mark.parametrize("name", CONFIGS)
def test_nan_under_the_mask_changes_no_loss_no_metric_and_no_gradient(name: str) -> None:
    results = []
    for fill in (0.0, math.nan):
        batch, logp = _batch(CONFIGS[name], fill)
        leaf = logp.requires_grad_()
        loss, metrics = _loss(CONFIGS[name], leaf, batch)
        loss.backward()
        results.append([loss, *metrics.values(), leaf.grad])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [[10], [5, 5], [1] * 10, [7, 0, 3]], ids=str)
def test_micro_batches_may_part_a_pair_and_change_nothing(name: str, cut: list[int]) -> None:
    batch, logp = _batch(CONFIGS[name])
    objective = _objective(CONFIGS[name])
    assert_cuts_change_nothing(
        lambda x, micro, counts: objective(ops.TokenOutputs(logp=x), micro, counts),
        logp, _told(objective, logp, batch), ops.count(batch["response_mask"]), cut,
    )  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("cut", [[5, 5], [1, 9], [0, 10], [3, 4, 3]], ids=str)
def test_ranks_may_part_a_pair_and_change_nothing(name: str, cut: list[int]) -> None:
    objective, (batch, logp) = _objective(CONFIGS[name]), _batch(CONFIGS[name])
    expected = objective.statistics(logp, batch, lambda values: values)
    found: dict[str, Tensor] = {column: torch.zeros(S, dtype=torch.float64) for column in expected}
    parts = torch.randperm(S, generator=torch.Generator().manual_seed(2)).split(cut)
    barrier, given = threading.Barrier(len(cut)), [torch.zeros(0, 4)] * len(cut)

    def ask(rank: int, rows: Tensor) -> None:
        def gather(values: Tensor) -> Tensor:
            given[rank] = values
            barrier.wait(10)
            return torch.cat(given)

        own = batch.rows(rows) if len(rows) else Batch({})
        for column, value in objective.statistics(logp[rows], own, gather).items():
            found[column][rows] = value.double()

    threads = [threading.Thread(target=ask, args=(rank, rows)) for rank, rows in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for column, value in expected.items():
        torch.testing.assert_close(found[column], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_equal_scores_pulls_neither_way(name: str) -> None:
    batch, logp = _batch(CONFIGS[name])
    leaf = logp.requires_grad_()
    loss, metrics = _loss(CONFIGS[name], leaf, batch)
    loss.backward()
    assert leaf.grad is not None and not leaf.grad[4:6].any() and leaf.grad[:4].any()
    without = [i for i in range(S) if i not in (4, 5)]
    assert _loss(CONFIGS[name], logp[without], batch.rows(without))[0].item() == pytest.approx(loss.item())
    tied = batch["response_mask"][4:6].sum() / batch["response_mask"].sum()
    assert metrics["actor/pair_tied"].item() == pytest.approx(tied.item())


@pytest.mark.parametrize("name", CONFIGS)
def test_all_equal_scores_stay_finite_and_teach_no_preference(name: str) -> None:
    batch, logp = _batch(CONFIGS[name])
    batch = batch.with_columns(advantages=0 * batch["advantages"], old_logp=logp.detach())
    leaf = logp.requires_grad_()
    loss, _ = _loss(CONFIGS[name], leaf, batch)
    loss.backward()
    assert loss.item() == 0 and leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gap", [-80.0, 80.0])
def test_extreme_log_ratios_keep_loss_and_gradient_finite(name: str, gap: float) -> None:
    batch, _ = _batch(CONFIGS[name])
    single = Batch({key: value.float() if value.is_floating_point() else value for key, value in batch.columns.items()})
    moved = gap * single["advantages"].sign()
    leaf = (single["ref_logp"] + moved).requires_grad_()
    loss, _ = _loss(CONFIGS[name], leaf, single)
    loss.backward()
    assert leaf.grad is not None and torch.isfinite(loss) and torch.isfinite(leaf.grad).all()


def test_dpo_without_a_margin_is_the_policy_gradient_of_the_preference() -> None:
    batch, _ = _batch(CONFIGS["dpo"])
    leaf = batch["ref_logp"].clone().requires_grad_()
    _loss(CONFIGS["dpo"], leaf, batch)[0].backward()
    num_pairs, beta = 4, 0.4
    torch.testing.assert_close(leaf.grad, -0.5 * beta * batch["advantages"] / num_pairs)


def test_on_policy_sppo_is_the_policy_gradient_of_twice_the_advantage() -> None:
    batch, _ = _batch(CONFIGS["sppo"])
    leaf = batch["old_logp"].clone().requires_grad_()
    _loss(CONFIGS["sppo"], leaf, batch)[0].backward()
    torch.testing.assert_close(leaf.grad, -2 * batch["advantages"] / ops.count(batch["response_mask"]).sequences)


def test_spin_chooses_by_score_wherever_the_rows_of_a_pair_lie() -> None:
    batch, _ = _batch(CONFIGS["dpo"])
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1))
    shuffled = Spin(SpinConfig()).advantages(batch.rows(order)).advantages
    torch.testing.assert_close(shuffled, batch["advantages"][order])
    sides = [batch["advantages"][i][batch["response_mask"][i].bool()].unique().tolist() for i in range(S)]
    assert sides == [[1], [-1], [-1], [1], [0], [0], [1], [], [-1], [1]]


def test_pair_losses_say_what_they_need_of_the_whole_mini_batch() -> None:
    for name in PAIRS:
        objective, (batch, logp) = _objective(CONFIGS[name]), _batch(CONFIGS[name])
        assert isinstance(objective.loss, PairLoss) and isinstance(objective.loss, WholeBatchLoss)
        columns: dict[str, Any] = objective.statistics(logp, batch, lambda values: values)
        assert set(columns) == set(objective.loss.columns)
        with pytest.raises(AssertionError, match="whole mini-batch"):
            objective(ops.TokenOutputs(logp=logp), batch, ops.count(batch["response_mask"]))
