"""The step of ReMax (arXiv:2310.10505): one greedy response a prompt is the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import GreedyRun


def step(run: GreedyRun, prompts: Sequence[PromptRow]) -> None:
    """Generate, judge, compare with greedy responses, learn, and hand the new weights to the rollout engines."""
    batch = run.generate(prompts)
    batch = run.score(batch)
    batch = run.greedy_baseline(batch, prompts)
    batch = run.logprobs(batch)
    batch = run.advantages(batch)
    run.update_actor(batch)
    run.sync()
