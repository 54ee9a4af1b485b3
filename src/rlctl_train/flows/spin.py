"""The step of SPIN (arXiv:2401.01335): the policy learns from pairs of its own, and against an earlier self."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import SelfPlayRun


def step(run: SelfPlayRun, prompts: Sequence[PromptRow]) -> None:
    """Generate pairs, judge, learn, hand the new weights to the rollout engines and, at times, to the reference."""
    batch = run.generate(prompts)
    batch = run.score(batch)
    batch = run.logprobs(batch)
    batch = run.advantages(batch)
    run.update_actor(batch)
    run.sync()
    run.refresh_reference()
