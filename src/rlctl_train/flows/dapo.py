"""The step of DAPO (arXiv:2503.14476): generate until enough groups teach something, then learn as GRPO does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import BatchRef, ResamplingRun

REFILL_MARGIN = 1.25
"""Refills ask for more than the groups still missing need on average: a round too many costs the time of its longest
response, a group too many only its own tokens."""


def step(run: ResamplingRun, prompts: Sequence[PromptRow]) -> None:
    """Sample groups of unequal scores, learn from them, and hand the new weights to the rollout engines."""
    batch = dynamic_sampling(run, prompts)
    batch = run.logprobs(batch)
    batch = run.advantages(batch)
    run.update_actor(batch)
    run.sync()


def dynamic_sampling(run: ResamplingRun, prompts: Sequence[PromptRow]) -> BatchRef:
    """Return as many groups as there are prompts, of unequal scores as far as `max_rounds` rounds bring them.

    A group of equal scores has no advantage and teaches nothing: it is left out, and other prompts are drawn in its
    place. What is missing after the last round is filled up with groups left out, so the batch keeps its size. Groups
    found beyond it are given up rather than kept for the next step, whose policy did not sample them: all that
    outlives the step is the place in the training data.
    """
    wanted, rounds = len(prompts), 0
    batches: list[BatchRef] = []
    unequal: list[tuple[int, int]] = []
    equal: list[tuple[int, int]] = []
    total, responses = 0.0, 0
    while len(unequal) < wanted and rounds < run.max_rounds:
        if rounds:
            prompts = run.more_prompts(_refill(wanted, len(unequal), len(equal)))
        batch = run.score(run.generate(prompts))
        for group, scores in enumerate(run.scores(batch)):
            (unequal if max(scores) > min(scores) else equal).append((rounds, group))
            total, responses = total + sum(scores), responses + len(scores)
        batches.append(batch)
        rounds += 1
    kept = unequal[:wanted]
    filled = equal[: wanted - len(kept)]
    run.record(
        {
            "sampling/rounds": rounds,
            "sampling/kept_groups": len(kept),
            "sampling/dropped_groups": len(equal) - len(filled),
            "sampling/filled_groups": len(filled),
            "sampling/surplus_groups": len(unequal) - len(kept),
            "sampling/score_mean": total / responses,
        }
    )
    chosen = sorted(kept + filled)
    return run.choose([(batch, [g for r, g in chosen if r == round_]) for round_, batch in enumerate(batches)])


def _refill(wanted: int, num_unequal: int, num_equal: int) -> int:
    """Return how many prompts to draw for the missing groups at the rate so far; never more than a whole batch."""
    if num_unequal == 0:
        return wanted
    per_group = (num_unequal + num_equal) / num_unequal
    return min(wanted, math.ceil(REFILL_MARGIN * per_group * (wanted - num_unequal)))
