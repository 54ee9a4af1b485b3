"""GRPO's and PPO's advantages against plain NumPy loops, and the KL penalty inside the reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlctl_train.algos.grpo import Grpo
from rlctl_train.algos.kl_control import KlController
from rlctl_train.algos.ppo import Ppo, gae
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig, PpoConfig
from rlctl_train.config.policy import AdaptiveKl, FixedKl

LENGTHS = [3, 5, 1, 4, 2, 5]


def _batch(scores: list[float], groups: list[int], *, fill: float = 0.0) -> Batch:
    """Return a batch with the score on each last token and `fill` in every masked place."""
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in LENGTHS[: len(scores)]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(scores)), mask.sum(-1).long() - 1] = torch.tensor(scores, dtype=torch.float64)
    columns = {"rewards": rewards}
    for name in ("values", "old_logp", "ref_logp"):
        columns[name] = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    filled = {name: torch.where(mask.bool(), column, fill) for name, column in columns.items()}
    return Batch({**filled, "response_mask": mask, "group": torch.tensor(groups)})


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 1], [7, 2, 7, 2, 2, 7]])
def test_grpo_compares_each_score_with_its_group_in_any_order(normalize_std: bool, groups: list[int]) -> None:
    scores = [1.0, 0.0, 0.5, 2.0, -1.0, 0.25]
    batch = _batch(scores, groups)
    ours = Grpo(GrpoConfig(normalize_std=normalize_std)).advantages(batch).advantages
    for row, (score, group) in enumerate(zip(scores, groups, strict=True)):
        peers = np.array([s for s, g in zip(scores, groups, strict=True) if g == group])
        expected = score - peers.mean()
        if normalize_std:
            expected /= peers.std(ddof=1) + 1e-6
        np.testing.assert_allclose(ours[row].numpy(), expected * batch["response_mask"][row].numpy(), rtol=1e-12)


def test_a_group_of_equal_scores_teaches_nothing_also_in_float32() -> None:
    batch = _batch([0.1, 0.1, 0.1], [4, 4, 4])
    batch = batch.with_columns(rewards=batch["rewards"].float())
    assert Grpo(GrpoConfig()).advantages(batch).advantages.abs().max() < 1e-7


def test_a_group_of_one_has_no_baseline_and_gives_zero() -> None:
    assert (Grpo(GrpoConfig()).advantages(_batch([1.0, 0.0, 1.0], [0, 1, 1])).advantages[0] == 0).all()


def test_grpo_sums_token_rewards_into_the_score() -> None:
    batch = _batch([1.0, 0.0], [0, 0])
    spread = batch.with_columns(rewards=batch["response_mask"] * torch.tensor([[1 / 3], [0.0]]).double())
    config = GrpoConfig(normalize_std=False)
    ours, whole = Grpo(config).advantages(spread), Grpo(config).advantages(batch)
    torch.testing.assert_close(ours.advantages, whole.advantages)


def _numpy_gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Sum (gamma lam)^k delta over the tokens that follow, for one row without gaps."""
    n = len(rewards)
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    return np.array([sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0)])
def test_gae_equals_the_sum_of_discounted_errors(gamma: float, lam: float) -> None:
    batch = _batch([1.0, 0.0, 0.5, 2.0, -1.0, 0.25], [0] * 6)
    result = Ppo(PpoConfig(gamma=gamma, lam=lam)).advantages(batch)
    raw = np.zeros((6, 5))
    for row, n in enumerate(LENGTHS):
        raw[row, :n] = _numpy_gae(batch["rewards"][row, :n].numpy(), batch["values"][row, :n].numpy(), gamma, lam)
    mask = batch["response_mask"].bool().numpy()
    kept = raw[mask]
    assert result.returns is not None
    np.testing.assert_allclose(result.returns.numpy()[mask], kept + batch["values"].numpy()[mask], atol=1e-14)
    white = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(result.advantages.numpy()[mask], white, rtol=1e-12, atol=1e-14)


def test_gae_carries_value_and_advantage_over_a_tools_reply() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.6, -0.1]], dtype=torch.float64)
    joined = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    gap = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]])
    place = gap.bool()
    wide_rewards, wide_values = torch.zeros(1, 5).double(), torch.full((1, 5), 99.0).double()
    wide_rewards[place], wide_values[place] = rewards[0], values[0]
    spread = gae(wide_rewards, wide_values, gap, gamma=0.9, lam=0.8)
    torch.testing.assert_close(spread[place], joined[0])
    assert (spread[~place] == 0).all()


def test_lambda_one_makes_the_return_the_score() -> None:
    batch = _batch([1.0, 0.0, 0.5], [0, 0, 0])
    returns = Ppo(PpoConfig(gamma=1.0, lam=1.0)).advantages(batch).returns
    assert returns is not None
    torch.testing.assert_close(returns, batch["response_mask"] * torch.tensor([[1.0], [0.0], [0.5]]).double())


@pytest.mark.parametrize("algo", [Grpo(GrpoConfig()), Ppo(PpoConfig(lam=0.9))])
def test_nan_under_the_mask_changes_no_advantage(algo: Grpo | Ppo) -> None:
    scores, groups = [1.0, 0.0, 0.5, 2.0], [0, 0, 1, 1]
    clean, dirty = algo.advantages(_batch(scores, groups)), algo.advantages(_batch(scores, groups, fill=math.nan))
    assert torch.equal(clean.advantages, dirty.advantages)
    assert clean.returns is None or (dirty.returns is not None and torch.equal(clean.returns, dirty.returns))


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_the_penalty_is_taken_from_every_token_and_summed_per_sequence(fill: float) -> None:
    batch = _batch([1.0, 0.0, 0.5], [0, 0, 0], fill=fill)
    clean = _batch([1.0, 0.0, 0.5], [0, 0, 0])
    kl = ((clean["old_logp"] - clean["ref_logp"]) * clean["response_mask"]).numpy()
    rewards, mean_kl = KlController(FixedKl(coef=0.5)).apply(batch)
    np.testing.assert_allclose(rewards.numpy(), clean["rewards"].numpy() - 0.5 * kl, rtol=1e-12)
    assert mean_kl == pytest.approx(kl.sum(-1).mean())


def test_a_fixed_coefficient_stays() -> None:
    controller = KlController(FixedKl(coef=0.5))
    controller.update(100.0, 64)
    assert controller.coef == 0.5


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.1, 1.0), (10.0, 1 + 0.2 * 64 / 1000), (0.0, 1 - 0.2 * 64 / 1000), (0.11, 1 + 0.1 * 0.064)]
)
def test_an_adaptive_coefficient_moves_towards_the_target(kl: float, factor: float) -> None:
    controller = KlController(AdaptiveKl(coef=0.5, target=0.1, horizon=1000))
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(0.5 * factor)


def test_a_controller_continues_from_its_state() -> None:
    first, second = (KlController(AdaptiveKl(coef=0.5)) for _ in range(2))
    first.update(3.0, 512)
    second.load_state(first.state())
    assert second.coef == first.coef != 0.5
