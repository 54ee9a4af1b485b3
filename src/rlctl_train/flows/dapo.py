"""The step of DAPO (arXiv:2503.14476): generate until enough groups teach something, then learn as GRPO does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import BatchRef, ResamplingRun

Run = TypeVar("Run", bound=ResamplingRun)
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


def unequal_scores(run: ResamplingRun, batch: BatchRef) -> list[bool]:
    """Say of each group whether its scores differ: equal ones have no advantage and teach nothing."""
    return [max(scores) > min(scores) for scores in run.scores(batch)]


def dynamic_sampling(
    run: Run, prompts: Sequence[PromptRow], teaches: Callable[[Run, BatchRef], list[bool]] = unequal_scores
) -> BatchRef:
    """Return as many groups as there are prompts, of those that teach as far as `max_rounds` rounds bring them.

    A group that does not teach is left out, and other prompts are drawn in its place. What is missing after the last
    round is filled up with groups left out, so the batch keeps its size. Groups found beyond it are given up rather
    than kept for the next step, whose policy did not sample them: all that outlives the step is the place in the
    training data.
    """
    wanted, rounds = len(prompts), 0
    batches: list[BatchRef] = []
    useful: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    total, responses = 0.0, 0
    while len(useful) < wanted and rounds < run.max_rounds:
        if rounds:
            prompts = run.more_prompts(_refill(wanted, len(useful), len(others)))
        batch = run.score(run.generate(prompts))
        for group, (scores, is_useful) in enumerate(zip(run.scores(batch), teaches(run, batch), strict=True)):
            (useful if is_useful else others).append((rounds, group))
            total, responses = total + sum(scores), responses + len(scores)
        batches.append(batch)
        rounds += 1
    kept = useful[:wanted]
    filled = others[: wanted - len(kept)]
    run.record(
        {
            "sampling/rounds": rounds,
            "sampling/kept_groups": len(kept),
            "sampling/dropped_groups": len(others) - len(filled),
            "sampling/filled_groups": len(filled),
            "sampling/surplus_groups": len(useful) - len(kept),
            "sampling/score_mean": total / responses,
        }
    )
    chosen = sorted(kept + filled)
    return run.choose([(batch, [g for r, g in chosen if r == round_]) for round_, batch in enumerate(batches)])


def _refill(wanted: int, num_useful: int, num_others: int) -> int:
    """Return how many prompts to draw for the missing groups at the rate so far; never more than a whole batch."""
    if num_useful == 0:
        return wanted
    per_group = (num_useful + num_others) / num_useful
    return min(wanted, math.ceil(REFILL_MARGIN * per_group * (wanted - num_useful)))
