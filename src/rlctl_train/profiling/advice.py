"""Sentences about a profiled step, each with the number it rests on, the weightiest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from rlctl_train.profiling.garbage import GARBAGE
from rlctl_train.profiling.spans import clipped, total_s
from rlctl_train.profiling.steps import Phase, StepProfile
from rlctl_train.profiling.waiting import CALLS

MENTIONED = 0.05
"""Share of the step below which nothing is said."""
UNEVEN = 1.2
"""The busiest rank against the mean of its role in a phase."""
TAIL = 0.15
"""Share of generation that its last sequences take."""
HANGING = 0.25
"""Share of the step that one kind of work makes up."""
LITTLE = 0.25
"""Model-FLOPs utilisation below which something is said; well-tuned trainers publish 0.3 to 0.4."""
FULLER = 1.2
"""Measured against predicted memory."""
COMMUNICATING = 0.2
"""Share of a rank's time in a phase."""
ROLLOUT = "rollout"
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


@dataclass(frozen=True)
class Seen:
    """What a profile shows beside its ranges, as the summary has it."""

    critical: Sequence[Mapping[str, Any]] = ()
    bubbles: Sequence[Mapping[str, Any]] = ()
    kinds: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Seconds by worker, phase and what operations are for."""
    memory: Sequence[Mapping[str, Any]] = ()


def advise(step: StepProfile, metrics: Mapping[str, float], predicted_s: Mapping[str, float], seen: Seen) -> list[str]:
    """Return what stands out. `metrics` are those of the step; `predicted_s` the planner's seconds by phase."""
    found = [*_largest(step, metrics), *_hanging(step, seen), *_uneven(step), *_standing(step, seen), *_idle(step)]
    found += [*_between(step), *_unlike_the_plan(step, predicted_s), *_slow(step, metrics), *_fuller(seen)]
    found += [*_communicating(step, seen), *_collecting(step)]
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
    tail = metrics.get("perf/tail_share", 0.0)
    if phase.name == "gen" and tail > TAIL:
        sentence += (
            f"; its last 5% of sequences take {tail:.0%} of it (the longest has {longest:.0f} tokens, the mean "
            f"{average:.0f}): more responses at once, or a lower rollout.max_response_tokens, shorten that tail"
        )
    elif phase.name == "gen" and average and longest / average > LONG:
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
            late = _latest(step, phase, role)
            lost = (max(busy) - mean(busy)) / step.seconds
            if late is not None:  # the others' time is waiting for it
                found.append(late)
            elif max(busy) > UNEVEN * mean(busy) and lost > MENTIONED / 2:
                found.append(
                    (
                        lost,
                        f"in {word(phase.name)} the busiest {role} rank works {max(busy):.3g} s and the mean "
                        f"{mean(busy):.3g} s: the others wait {lost:.0%} of the step",
                    )
                )
    return found


def _latest(step: StepProfile, phase: Phase, role: str) -> Weighted | None:
    """Name the rank that begins a phase later than the others of its role, where that costs something."""
    if role == ROLLOUT:  # engines do not wait for each other
        return None
    begins = {
        worker.name: spans[0][0]
        for worker in step.workers
        if worker.role == role and (spans := clipped(worker.busy(step.span), phase.spans[0]))
    }
    if len(begins) < 2:
        return None
    *_, before, last = sorted(begins, key=lambda name: begins[name])
    late_s = (begins[last] - begins[before]) / 1e9
    if late_s < MENTIONED / 2 * step.seconds:
        return None
    sentence = (
        f"in {word(phase.name)} {last} begins {late_s:.3g} s after the other {role} ranks, which wait for it: "
        f"{late_s / step.seconds:.0%} of the step"
    )
    return late_s / step.seconds, sentence


def _collecting(step: StepProfile) -> list[Weighted]:
    """Say whom Python's garbage collector holds up."""
    found = []
    for worker in (step.driver, *step.workers):
        collections = [(one.start_ns, one.end_ns) for one in worker.ranges if one.name == GARBAGE]
        seconds = total_s(clipped(collections, step.span))
        if seconds > MENTIONED * step.seconds:
            share = seconds / step.seconds
            found.append(
                (share, f"Python's garbage collector stops {worker.name} for {seconds:.3g} s, {share:.0%} of the step")
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


def _hanging(step: StepProfile, seen: Seen) -> list[Weighted]:
    """Name the one kind of work that the step hangs on most, where that is not simply the largest phase."""
    if not seen.critical:
        return []
    link = seen.critical[0]
    share = link["seconds"] / step.seconds
    if share < HANGING:
        return []
    return [(share / 2, f"{share:.0%} of the step hang on {link['what']} of {link['who']} in {word(link['phase'])}")]


def _standing(step: StepProfile, seen: Seen) -> list[Weighted]:
    """Say which device stands still most while other roles work, and in which phase."""
    found = [one for one in seen.bubbles if one["meanwhile"] != CALLS and one["seconds"] > MENTIONED * step.seconds]
    remedies = {"score": "more graders at once (grader.num_workers) shorten that"}
    other = "other shares of devices, or placement=colocated, would use it"
    return [
        (
            one["seconds"] / step.seconds,
            f"{one['device']} stands still for {one['seconds'] / step.seconds:.0%} of the step while "
            f"{one['meanwhile']} works in {word(one['phase'])}: {remedies.get(one['meanwhile'], other)}",
        )
        for one in found[:1]
    ]


def _slow(step: StepProfile, metrics: Mapping[str, float]) -> list[Weighted]:
    """Say where trainer passes reach little of the device's peak."""
    found = []
    for phase in step.phases:
        mfu = metrics.get(f"perf/mfu/{phase.name}")
        if mfu is not None and phase.name != "gen" and mfu < LITTLE and phase.share > MENTIONED:
            found.append(
                (
                    phase.share * (1 - mfu / LITTLE),
                    f"{word(phase.name)} reaches {mfu:.0%} of the device's peak (MFU), where {LITTLE:.0%} and more are "
                    "usual: larger engine.max_tokens_per_micro_batch, or longer mini-batches",
                )
            )
    return found


def _fuller(seen: Seen) -> list[Weighted]:
    """Say where the fullest device held much more than was predicted, and in which part most."""
    found = []
    for phase in dict.fromkeys(one["phase"] for one in seen.memory):
        parts = [one for one in seen.memory if one["phase"] == phase]
        predicted, measured = (sum(one[key] or 0.0 for one in parts) for key in ("predicted_gib", "measured_gib"))
        if predicted and measured > FULLER * predicted:
            worst = max(parts, key=lambda one: (one["measured_gib"] or 0.0) - (one["predicted_gib"] or 0.0))
            found.append(
                (
                    MENTIONED * measured / predicted,
                    f"the fullest device held {measured:.2f} GiB in {phase.replace('_', ' ')} where the planner "
                    f"expected {predicted:.2f} GiB, most more in {worst['part']}: `rlctl calibrate` corrects that",
                )
            )
    return sorted(found, key=lambda one: -one[0])[:1]


def _communicating(step: StepProfile, seen: Seen) -> list[Weighted]:
    """Say where ranks communicate much, and where one waits in that for another: whoever comes last waits least."""
    by_phase: dict[tuple[str, str], dict[str, Mapping[str, float]]] = {}
    for worker, phases in seen.kinds.items():
        for phase, seconds in phases.items():
            by_phase.setdefault((worker.rpartition(" ")[0], phase), {})[worker] = seconds
    found = []
    for (role, phase), ranks in by_phase.items():
        least, most = (pick(ranks, key=lambda rank: ranks[rank]["communication"]) for pick in (min, max))
        total, spent = sum(ranks[least].values()), ranks[least]["communication"]
        waits_s = ranks[most]["communication"] - spent
        if total > MENTIONED * step.seconds and spent > COMMUNICATING * total:
            who = least if len(ranks) == 1 else f"every {role} rank"
            remedy = "fewer ranks, larger micro-batches or a faster link"
            sentence = f"{spent / total:.0%} of the time of {who} in {word(phase)} is communication: {remedy}"
            found.append((spent / step.seconds, sentence))
        if waits_s > MENTIONED / 2 * step.seconds:
            sentence = f"in {word(phase)} {most} waits {waits_s:.3g} s longer than {least} for the other ranks"
            found.append((waits_s / step.seconds, f"{sentence}, which come later or have more to do"))
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
