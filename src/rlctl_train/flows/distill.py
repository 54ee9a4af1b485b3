"""The step of on-policy distillation (arXiv:2306.13649): the student writes, the teacher judges every token."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import TaughtRun


def step(run: TaughtRun, prompts: Sequence[PromptRow]) -> None:
    """Generate, judge, ask the teacher, learn, and hand the new weights to the rollout engines."""
    batch = run.generate(prompts)
    batch = run.score(batch)
    batch = run.logprobs(batch)
    batch = run.teach(batch)
    batch = run.advantages(batch)
    run.update_actor(batch)
    run.sync()
