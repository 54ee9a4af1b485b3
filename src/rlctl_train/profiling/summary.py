"""Everything that a profile says, as one record for programs. Reads a run folder; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, get_args

from rlctl_hw.types import MemoryPart

from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling.advice import Seen, advise
from rlctl_train.profiling.allocations import Allocation, peaks
from rlctl_train.profiling.devices import Found, read_devices
from rlctl_train.profiling.spans import Span, clipped, merged, total_s
from rlctl_train.profiling.steps import Device, StepProfile, Worker, read_steps
from rlctl_train.profiling.traces import TRACE, Event, Kind, Operation, operations
from rlctl_train.profiling.waiting import bubbles, critical_path
from rlctl_train.telemetry.metrics import read_metrics

MOST = 8
"""Operations named per worker and phase."""
LINKS = 12
"""Parts named of the critical path, and of bubbles."""
REST = "the rest"
"""What tensors come and go in a phase: activations, logits, caches, buffers, and what lies between them unused."""
HELD = ("weights", "gradients", "optimizer", "overhead")
"""Parts that a process can count; the planner's contexts are overhead too."""


def summarize(files: RunFiles, predicted_s: Mapping[str, float], predicted: Iterable[MemoryPart]) -> dict[str, Any]:
    """Return everything the profile of a run says, step by step.

    `predicted_s` are the planner's seconds by phase, where it has any, `predicted` its parts of memory. Seconds and
    shares of each phase are those of the driver; `busy_s` of each worker are what it was at work in it; `computed` of a
    device is the share in which it computed, by its kernels, else its driver's samples, on CPU processor time.
    """
    profiled = read_steps(files.profile)
    workers = sorted({(worker.role, worker.rank) for step in profiled for worker in step.workers})
    found = read_devices(files.profile, (f"{role}-{rank}" for role, rank in workers))
    metrics = {line["step"]: line for line in read_metrics(files.metrics) if line.get("phase") == "train"}
    parts = _parts(predicted)
    steps = [_step(step, found, metrics.get(step.step, {}), predicted_s, parts) for step in profiled]
    traces = sorted(str(file) for file in files.profile.rglob(f"*{TRACE}"))
    return {"run": files.root.name, "steps": steps, "traces": traces, "unread": found.unread}


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the median step of two profiles side by side, phase by phase; `times` is the second over the first."""
    return _side_by_side("phase", [_medians(_phase_seconds(step) for step in one["steps"]) for one in (first, second)])


def compare_operations(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the operations that either profile names, with their seconds of a median step over all workers that a tool
    recorded; those that differ most first."""
    rows = _side_by_side(
        "operation", [_medians(_operation_seconds(step) for step in one["steps"]) for one in (first, second)]
    )
    return sorted(rows, key=lambda row: -abs((row["second_s"] or 0.0) - (row["first_s"] or 0.0)))


def _step(
    step: StepProfile,
    found: Found,
    measured: Mapping[str, Any],
    predicted_s: Mapping[str, float],
    predicted_parts: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    events = {one.name: _within(step, found.events[f"{one.role}-{one.rank}"]) for one in step.workers}
    traced = {name: _operations(step, inside) for name, inside in events.items()}
    kinds = {n: {phase: _by_kind(made) for phase, made in by_phase.items()} for n, by_phase in traced.items()}
    phases = [
        {
            "name": phase.name,
            "seconds": phase.seconds,
            "share": phase.share,
            "predicted_s": predicted_s.get(phase.name),
            "busy_s": phase.busy_s,
            "tflops": measured.get(f"perf/tflops/{phase.name}"),
            "mfu": measured.get(f"perf/mfu/{phase.name}"),
        }
        for phase in step.phases
    ]
    made: dict[str, Any] = {
        "step": step.step,
        "seconds": step.seconds,
        "between_s": step.between_s,
        "tokens_per_s": measured.get("perf/total_num_tokens", 0.0) / step.seconds,
        "overlap": step.overlap,
        "nobody": step.nobody,
        "phases": phases,
        "workers": [_worker(step, worker) for worker in step.workers],
        "devices": [_device(step, device, events) for device in step.devices],
        "critical": [vars(link) for link in critical_path(step)[:LINKS]],
        "bubbles": [vars(bubble) for bubble in bubbles(step)[:LINKS]],
        "operations": {
            name: {phase: [vars(one) for one in inside[:MOST]] for phase, inside in by_phase.items()}
            for name, by_phase in traced.items()
            if by_phase
        },
        "kinds": {name: by_phase for name, by_phase in kinds.items() if by_phase},
        "memory": _memory(step, predicted_parts),
        "allocations": _allocations(step, found.allocations),
    }
    seen = Seen(made["critical"], made["bubbles"], kinds, made["memory"])
    return made | {"advice": advise(step, measured, predicted_s, seen)}


def _worker(step: StepProfile, worker: Worker) -> dict[str, Any]:
    return {
        "name": worker.name,
        "host": worker.host,
        "device": worker.device,
        "slot": worker.slot,
        "busy": step.busy_share(worker),
        "peak_gib": max((one.bytes_after for one in worker.ranges), default=0) / 2**30,
    }


def _device(step: StepProfile, device: Device, events: Mapping[str, Sequence[Event]]) -> dict[str, Any]:
    """Return how much of the step, and of each phase, a device had work, and computed."""
    kernels = merged(
        (one.start_ns, one.end_ns) for worker in device.workers for one in events[worker.name] if one.on_device
    )

    def computed(within: Span) -> float | None:
        if not kernels:
            return device.computed(within)
        return total_s(clipped(kernels, within)) / total_s([within])

    at_work = total_s(device.busy(step.span)) / step.seconds
    return {
        "name": device.name,
        "host": device.workers[0].host,
        "workers": [worker.name for worker in device.workers],
        "at_work": at_work,
        "idle": 1.0 - at_work,
        "computed": computed(step.span),
        "computed_by_phase": {
            phase.name: sum(share * total_s([span]) for share, span in known) / total_s(span for _, span in known)
            for phase in step.phases
            if (known := [(share, span) for span in phase.spans if (share := computed(span)) is not None])
        },
    }


def _within(step: StepProfile, events: Sequence[Event]) -> list[Event]:
    start, end = step.span
    return [event for event in events if start <= event.start_ns < end]


def _operations(step: StepProfile, events: Sequence[Event]) -> dict[str, list[Operation]]:
    """Return what a worker's events are in a step, by phase; nothing where no tool recorded it."""
    found = {phase.name: operations(events, phase.spans) for phase in step.phases}
    return {name: made for name, made in found.items() if made}


def _by_kind(made: Sequence[Operation]) -> dict[str, float]:
    """Return the seconds of operations by what they are for."""
    return {kind: sum(one.seconds for one in made if one.kind == kind) for kind in get_args(Kind)}


def _parts(predicted: Iterable[MemoryPart]) -> dict[str, dict[str, float]]:
    """Return the planner's GiB by phase and by the parts that a run can tell apart."""
    found: dict[str, dict[str, float]] = {}
    for part in predicted:
        name = "overhead" if part.part == "context" else part.part if part.part in HELD else REST
        of_phase = found.setdefault(part.phase, {})
        of_phase[name] = of_phase.get(name, 0.0) + part.gib
    return found


def _memory(step: StepProfile, predicted: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return what the fullest device held in each phase, part by part, beside what was predicted; in GiB."""
    return [
        {
            "phase": phase,
            "part": part,
            "predicted_gib": predicted.get(phase, {}).get(part),
            "measured_gib": measured.get("rest" if part == REST else part),
        }
        for phase, measured in step.parts_gib.items()
        for part in (*HELD, REST)
        if part in predicted.get(phase, {}) or measured.get("rest" if part == REST else part)
    ]


def _allocations(step: StepProfile, allocations: Mapping[str, Sequence[Allocation]]) -> dict[str, Any]:
    """Return, by worker and by its own phases, the most that tensors took above what there was, and who asked."""
    found = {}
    for worker in step.workers:
        start, end = step.span
        inside = [one for one in allocations[f"{worker.role}-{worker.rank}"] if start <= one.at_ns < end]
        spans: dict[str, list[Span]] = {}
        for one in worker.at(0):
            spans.setdefault(one.name, []).append((one.start_ns, one.end_ns))
        if inside:
            found[worker.name] = {phase: vars(peak) for phase, peak in peaks(inside, spans).items()}
    return found


def _phase_seconds(step: Mapping[str, Any]) -> dict[str, float]:
    return {"step": step["seconds"], **{phase["name"]: phase["seconds"] for phase in step["phases"]}}


def _operation_seconds(step: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for by_phase in step["operations"].values():
        for one in [one for made in by_phase.values() for one in made]:
            found[one["name"]] = found.get(one["name"], 0.0) + one["seconds"]
    return found


def _medians(steps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of every name over the steps that have it."""
    found: dict[str, list[float]] = {}
    for step in steps:
        for name, seconds in step.items():
            found.setdefault(name, []).append(seconds)
    return {name: median(seconds) for name, seconds in found.items()}


def _side_by_side(what: str, sides: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(name) for side in sides)
        times = after / before if before and after else None
        rows.append({what: name, "first_s": before, "second_s": after, "times": times})
    return rows
