"""DAPO's penalty on length and what it shares with GRPO; the loss itself is in test_algo_losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlctl_train.algos.dapo import Dapo, OverlongPenalty, overlong_penalty
from rlctl_train.algos.grpo import Grpo
from rlctl_train.batch import Batch, length_mask
from rlctl_train.config.algo import DapoConfig, GrpoConfig
from rlctl_train.config.losses import ClipLoss

LENGTHS = torch.tensor([1, 5, 8, 9, 12, 16])


def _batch(width: int = 16, **columns: Any) -> Batch:
    mask = length_mask(LENGTHS, width).double()
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(6), LENGTHS - 1] = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.25], dtype=torch.float64)
    group = torch.tensor([3, 3, 3, 1, 1, 1])
    return Batch({"rewards": rewards, "response_mask": mask, "response_len": LENGTHS, "group": group, **columns})


def _soft_punishment(length: int, longest: int, buffer: int) -> float:
    """The paper's equation 13, case by case."""
    if length <= longest - buffer:
        return 0.0
    return ((longest - buffer) - length) / buffer if length <= longest else -1.0


@pytest.mark.parametrize(("longest", "buffer"), [(16, 4), (16, 16), (10, 3), (8, 1)])
def test_the_penalty_is_the_papers_soft_punishment(longest: int, buffer: int) -> None:
    ours = OverlongPenalty(longest, buffer, penalty=1.0).of(LENGTHS)
    expected = [_soft_punishment(length, longest, buffer) for length in LENGTHS.tolist()]
    np.testing.assert_allclose(-ours.numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(OverlongPenalty(longest, buffer, penalty=0.3).of(LENGTHS), 0.3 * ours)


def test_the_penalty_is_taken_off_the_last_token_alone() -> None:
    batch = _batch()
    rewards, mean = OverlongPenalty(16, 8, penalty=2.0).apply(batch)
    taken = batch["rewards"] - rewards
    expected = np.array([0, 0, 0, 0.25, 1.0, 2.0])
    np.testing.assert_allclose(taken.sum(-1), expected)
    assert (taken[torch.arange(6), LENGTHS - 1] == taken.sum(-1)).all()
    assert mean == pytest.approx(expected.mean())


def test_the_buffer_is_a_fifth_of_the_longest_response_unless_given_and_a_penalty_of_zero_is_none() -> None:
    assert overlong_penalty(DapoConfig(), 20480) == OverlongPenalty(20480, 4096, 1.0)
    assert overlong_penalty(DapoConfig(), 2) == OverlongPenalty(2, 1, 1.0)
    assert overlong_penalty(DapoConfig(overlong_buffer_tokens=7), 16) == OverlongPenalty(16, 7, 1.0)
    assert overlong_penalty(DapoConfig(overlong_penalty=0), 16) is None


def test_shorter_right_answers_are_worth_more_than_long_ones() -> None:
    rewards, _ = OverlongPenalty(12, 6, penalty=1.0).apply(_batch())
    batch = _batch().with_columns(rewards=rewards)
    ours = Dapo(DapoConfig()).advantages(batch).advantages
    for group in (3, 1):
        members = np.flatnonzero(batch["group"].numpy() == group)
        scores = rewards.numpy()[members].sum(-1)
        expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(ours[members, 0], expected, rtol=1e-9)


def test_with_equal_clips_advantages_and_loss_are_those_of_grpo() -> None:
    dapo, grpo = Dapo(DapoConfig()), Grpo(GrpoConfig())
    batch = _batch()
    assert torch.equal(dapo.advantages(batch).advantages, grpo.advantages(batch).advantages)


def test_the_defaults_are_the_papers() -> None:
    config = DapoConfig()
    loss = config.loss
    assert isinstance(loss, ClipLoss)
    assert (loss.clip_low, loss.clip_high, config.aggregation, config.group_size) == (0.2, 0.28, "token-mean", 16)
    assert loss.dual_clip is None and config.roles() == ("actor",)
