"""Sentences about a profiled step, each with the number it rests on, the weightiest first."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from rlctl_train.profiling.steps import StepProfile

MENTIONED = 0.05
"""Share of the step below which nothing is said."""
UNEVEN = 1.2
"""The busiest rank against the mean of its role in a phase."""
LONG = 2.0
"""The longest response against the mean."""
FAR = 2.0
"""Measured against predicted seconds."""
WORDS = {
    "gen": "generation",
    "reward": "scoring",
    "old_log_prob": "the policy's log-probabilities",
    "ref": "the reference's log-probabilities",
    "values": "the critic's values",
    "adv": "advantages",
    "memory": "asking every worker for its memory",
    "update_critic": "the critic's update",
    "update_actor": "the policy's update",
    "update_weights": "moving weights to the rollout engines",
}


def advise(
    step: StepProfile, metrics: Mapping[str, float], predicted_s: Mapping[str, float], rates: Mapping[str, float]
) -> list[str]:
    """Return what stands out.

    `metrics` are those of the step; `predicted_s` the planner's seconds by phase; `rates` the share of each role's
    devices' time in it that is communication, by phase and role (`"update_actor of actor 0"`), where a trace tells.
    """
    found = [*_largest(step, metrics), *_uneven(step), *_idle(step), *_between(step)]
    found += _unlike_the_plan(step, predicted_s)
    found += [
        (
            share,
            f"{share:.0%} of the time of {what} is communication: fewer ranks, larger micro-batches or a faster link",
        )
        for what, share in rates.items()
        if share > 0.2
    ]
    return [sentence for _, sentence in sorted(found, key=lambda one: -one[0])]


Weighted = tuple[float, str]
"""A share of the step, and the sentence about it."""


def word(name: str) -> str:
    """Return what a person calls a phase."""
    return WORDS.get(name, name.replace("_", " "))


def _largest(step: StepProfile, metrics: Mapping[str, float]) -> list[Weighted]:
    if not step.phases:
        return []
    phase = max(step.phases, key=lambda one: one.share)
    sentence = f"{word(phase.name)} is {phase.share:.0%} of the step ({phase.seconds:.3g} of {step.seconds:.3g} s)"
    longest, average = metrics.get("response_length/max", 0.0), metrics.get("response_length/mean", 0.0)
    if phase.name == "gen" and average and longest / average > LONG:
        sentence += (
            f"; the longest response has {longest:.0f} tokens, {longest / average:.1f} times the mean, and all others "
            "wait for it: more responses at once, or a lower rollout.max_response_tokens"
        )
    return [(phase.share, sentence)]


def _uneven(step: StepProfile) -> list[Weighted]:
    found = []
    for phase in step.phases:
        for role in dict.fromkeys(worker.role for worker in step.workers):
            busy = [phase.busy_s.get(worker.name, 0.0) for worker in step.workers if worker.role == role]
            if len(busy) < 2 or not any(busy):
                continue
            lost = (max(busy) - mean(busy)) / step.seconds
            if max(busy) > UNEVEN * mean(busy) and lost > MENTIONED / 2:
                found.append(
                    (
                        lost,
                        f"in {word(phase.name)} the busiest {role} rank works {max(busy):.3g} s and the mean "
                        f"{mean(busy):.3g} s: the others wait {lost:.0%} of the step",
                    )
                )
    return found


def _idle(step: StepProfile) -> list[Weighted]:
    """Say where roles on devices of their own stand still."""
    shares = {worker.name: step.busy_share(worker) for worker in step.workers if worker.role in ("actor", "rollout")}
    found = []
    if step.overlap < MENTIONED and len({worker.role for worker in step.workers} & {"actor", "rollout"}) == 2:
        actor, rollout = (_share(shares, role) for role in ("actor", "rollout"))
        found.append(
            (
                MENTIONED,
                f"trainer and rollout work in turns ({actor:.0%} and {rollout:.0%} of the step): on own devices "
                "(placement=split) each would stand still the rest of it",
            )
        )
    return found


def _share(shares: Mapping[str, float], role: str) -> float:
    return mean(share for name, share in shares.items() if name.startswith(f"{role} "))


def _between(step: StepProfile) -> list[Weighted]:
    found = []
    if step.nobody > MENTIONED:
        found.append(
            (
                step.nobody,
                f"in {step.nobody:.0%} of the step no worker is at work: calls and data are on their way; larger steps "
                "(trainer.prompts_per_step) make that share smaller",
            )
        )
    return found


def _unlike_the_plan(step: StepProfile, predicted_s: Mapping[str, float]) -> list[Weighted]:
    found = []
    for phase in step.phases:
        expected = predicted_s.get(phase.name)
        if expected and phase.share > MENTIONED and phase.seconds > FAR * expected:
            found.append(
                (
                    phase.share - expected / step.seconds,
                    f"{word(phase.name)} takes {phase.seconds:.3g} s where the planner expected {expected:.3g} s: "
                    "`rlctl calibrate` corrects its rates, if this machine was otherwise idle",
                )
            )
    return found
