"""The step of PRIME (arXiv:2502.01456): a reward model learns from outcomes and rewards every token."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.dapo import dynamic_sampling
from rlctl_train.flows.verbs import BatchRef, RewardModelRun


def step(run: RewardModelRun, prompts: Sequence[PromptRow]) -> None:
    """Sample groups neither too hard nor too easy, reward their tokens, learn, and hand the new weights on."""
    batch = dynamic_sampling(run, prompts, is_between)
    batch = run.logprobs(batch)
    if run.reward_update == "before":
        run.update_reward_model(batch)
    batch = run.reward_logprobs(batch)
    if run.reward_update == "after":
        run.update_reward_model(batch)
    batch = run.advantages(batch)
    run.update_actor(batch)
    run.sync()


def is_between(run: RewardModelRun, batch: BatchRef) -> list[bool]:
    """Say of each group whether its share of right responses is within the bounds."""
    low, high = run.accuracy_bounds
    return [low <= accuracy <= high for accuracy in run.accuracies(batch)]
