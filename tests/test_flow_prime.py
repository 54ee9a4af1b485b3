"""The step of PRIME: which groups it learns from, and when its reward model learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from rlctl_train.flows import prime
from tests.test_flow_dapo import EQUAL, MIXED, FakeRun


@dataclass
class FakeRewardRun(FakeRun):
    """A run in which what a response scores says whether it is right."""

    reward_update: Literal["before", "after", "none"] = "before"
    accuracy_bounds: tuple[float, float] = (0.2, 0.8)

    def accuracies(self, batch: list[int]) -> list[float]:
        return [sum(scores) / len(scores) for scores in self.scores(batch)]

    def update_reward_model(self, batch: list[int]) -> None:
        self.called.append("update_reward_model")

    def reward_logprobs(self, batch: list[int]) -> list[int]:
        self.called.append("reward_logprobs")
        return batch


@pytest.mark.parametrize(
    ("update", "between"),
    [
        ("before", ["update_reward_model", "reward_logprobs"]),
        ("after", ["reward_logprobs", "update_reward_model"]),
        ("none", ["reward_logprobs"]),
    ],
)
def test_the_reward_model_learns_when_it_is_told_to(
    update: Literal["before", "after", "none"], between: list[str]
) -> None:
    run = FakeRewardRun([MIXED], reward_update=update)
    prime.step(run, run.more_prompts(1))
    assert run.called == ["logprobs", *between, "advantages", "update_actor", "sync"]


def test_groups_too_easy_and_too_hard_are_replaced() -> None:
    run = FakeRewardRun([EQUAL, [1.0, 1.0, 1.0, 1.0, 0.0, 1.0], MIXED, MIXED], accuracy_bounds=(0.4, 0.6))
    prime.step(run, run.more_prompts(2))
    assert run.learnt == [2, 3] and run.metrics["sampling/dropped_groups"] == 2


def test_bounds_are_of_those_that_teach() -> None:
    run = FakeRewardRun([MIXED, EQUAL], accuracy_bounds=(0.5, 1.0))
    prime.step(run, run.more_prompts(2))
    assert run.learnt == [0, 1] and run.metrics["sampling/filled_groups"] == 0
