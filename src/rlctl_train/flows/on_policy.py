"""The on-policy step shared by PPO, GRPO and their relatives."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import RolloutRun


def step(run: RolloutRun, prompts: Sequence[PromptRow]) -> None:
    """Generate, judge, learn, and hand the new weights to the rollout engines."""
    batch = run.generate(prompts)
    batch = run.score(batch)
    batch = run.logprobs(batch)
    batch = run.values(batch)
    batch = run.advantages(batch)
    batch = run.resample(batch)
    run.update_critic(batch)
    run.update_actor(batch)
    run.sync()
