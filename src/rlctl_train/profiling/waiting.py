"""Why a step takes as long as it does: its critical path, and the bubbles in which devices stand still."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from rlctl_train.profiling.spans import Span, clipped, merged, outside
from rlctl_train.profiling.steps import Device, Phase, StepProfile, Worker
from rlctl_train.profiling.timeline import Range

CALLS = "calls and data"
"""What passes between workers: the driver, Ray, and tensors on their way."""
BETWEEN = "between phases"
NUMBER = re.compile(r" \d+$")


@dataclass(frozen=True)
class Link:
    """One kind of work on the critical path."""

    phase: str
    who: str
    """The worker that the step waited for; `CALLS` where it waited for none."""
    what: str
    """The innermost range that it was in, without its number."""
    seconds: float


@dataclass(frozen=True)
class Bubble:
    """Time in which a device stands still, in one phase."""

    device: str
    phase: str
    meanwhile: str
    """Roles that work elsewhere then; `CALLS` where none does."""
    seconds: float


def critical_path(step: StepProfile) -> list[Link]:
    """Return what the step's length is made of, most first: the parts add up to the step.

    Walked from the end of each phase back to its begin: the worker whose work ended last, then of those that had ended
    when it began the last, and so on. What lies between is the driver's, Ray's, or data on their way.
    """
    found: dict[tuple[str, str, str], int] = {}

    def add(phase: str, who: str, what: str, ns: int) -> None:
        key = phase, who, what
        found[key] = found.get(key, 0) + ns

    for phase in step.phases:
        for span in phase.spans:
            _walk(step, phase, span, add)
    links = [Link(*key, ns / 1e9) for key, ns in found.items() if ns > 0]
    if step.between_s > 0:
        links.append(Link(BETWEEN, CALLS, CALLS, step.between_s))
    return sorted(links, key=lambda link: -link.seconds)


def bubbles(step: StepProfile) -> list[Bubble]:
    """Return when each device stands still: no worker on it is at work; longest first."""
    spans_of = {phase.name: phase.spans for phase in step.phases}
    spans_of[BETWEEN] = tuple(outside(merged(span for spans in spans_of.values() for span in spans), step.span))
    found: dict[tuple[str, str, str], int] = {}
    for device in step.devices:
        idle, elsewhere = outside(device.busy(step.span), step.span), _elsewhere(step, device)
        for phase, spans in spans_of.items():
            for part in [part for span in spans for part in clipped(idle, span)]:
                for meanwhile, ns in _meanwhile(elsewhere, part).items():
                    key = device.name, phase, meanwhile
                    found[key] = found.get(key, 0) + ns
    return sorted((Bubble(*key, ns / 1e9) for key, ns in found.items() if ns > 0), key=lambda one: -one.seconds)


def _walk(step: StepProfile, phase: Phase, span: Span, add: Callable[[str, str, str, int], None]) -> None:
    work = [
        (cut[0], worker)
        for worker in step.workers
        for one in worker.at(0)
        if (cut := clipped([(one.start_ns, one.end_ns)], span))
    ]
    cursor = span[1]
    for (start, end), worker in sorted(work, key=lambda one: (-one[0][1], one[0][0])):
        if end > cursor:
            continue  # it went on when what was waited for began, and so was not what that waited for
        add(phase.name, CALLS, CALLS, cursor - end)
        for what, ns in _innermost(worker, (start, end)).items():
            add(phase.name, worker.name, what, ns)
        cursor = start
    add(phase.name, CALLS, CALLS, cursor - span[0])


def _innermost(worker: Worker, within: Span) -> dict[str, int]:
    """Return the nanoseconds of a span by the innermost range of a worker, numbers left off."""
    found: dict[str, int] = {}
    around: list[Range] = []
    for one in worker.ranges:
        if not (length := sum(end - start for start, end in clipped([(one.start_ns, one.end_ns)], within))):
            continue
        while around and around[-1].end_ns <= one.start_ns:
            around.pop()
        name = NUMBER.sub("", one.name)
        found[name] = found.get(name, 0) + length
        if around and around[-1].depth < one.depth:
            outer = NUMBER.sub("", around[-1].name)
            found[outer] -= length
        around.append(one)
    return found


def _elsewhere(step: StepProfile, device: Device) -> dict[str, list[Span]]:
    """Return when each role is at work on other devices, or on none."""
    roles = dict.fromkeys(worker.role for worker in step.workers if worker not in device.workers)
    return {
        role: merged(
            span for w in step.workers if w.role == role and w not in device.workers for span in w.busy(step.span)
        )
        for role in roles
    }


def _meanwhile(elsewhere: Mapping[str, list[Span]], within: Span) -> dict[str, int]:
    """Return the nanoseconds of a span by the roles that are at work then."""
    inside = {role: spans for role, all_spans in elsewhere.items() if (spans := clipped(all_spans, within))}
    edges = sorted({*within, *(at for spans in inside.values() for span in spans for at in span)})
    found: dict[str, int] = {}
    for start, end in pairwise(edges):
        name = " and ".join(role for role, spans in inside.items() if clipped(spans, (start, end))) or CALLS
        found[name] = found.get(name, 0) + end - start
    return found
