"""Traces of torch.profiler: which operations and kernels take the time of each phase.

The format is Chrome's trace events: complete events (`"ph": "X"`) with `ts` and `dur` in microseconds, to which
`baseTimeNanoseconds` adds the unix time.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlctl_train.profiling.spans import Span

TRACE = ".trace.json.gz"
Kind = Literal["compute", "communication", "copy"]
ON_HOST, ON_DEVICE = {"cpu_op"}, {"kernel", "gpu_memcpy", "gpu_memset", "collective_comm"}
COMMUNICATION = re.compile(
    r"nccl|rccl|hccl|hcom_|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|broadcast_|barrier", re.I
)
COPY = re.compile(r"memcpy|memset|copy_|_to_copy|clone|contiguous", re.I)


@dataclass(frozen=True)
class Operation:
    """All calls of one operation in one phase."""

    name: str
    kind: Kind
    calls: int
    seconds: float
    """Without the operations that it calls."""


@dataclass(frozen=True)
class Event:
    """One call."""

    name: str
    thread: tuple[Any, Any]
    start_ns: int
    end_ns: int
    on_device: bool


def read_trace(path: Path) -> dict[str, Any]:
    """Return what a trace holds."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def events_of(content: Mapping[str, Any]) -> list[Event]:
    """Return the operations and kernels of a trace; kernels alone where there are any: the host then only launches."""
    base = int(content.get("baseTimeNanoseconds", 0))
    events = [
        Event(
            one["name"],
            (one.get("pid"), one.get("tid")),
            base + round(one["ts"] * 1000),
            base + round((one["ts"] + one["dur"]) * 1000),
            one["cat"] in ON_DEVICE,
        )
        for one in content.get("traceEvents", [])
        if one.get("ph") == "X" and one.get("cat") in ON_HOST | ON_DEVICE
    ]
    return [one for one in events if one.on_device] or events


def operations(events: Iterable[Event], spans: Sequence[Span]) -> list[Operation]:
    """Return what ran in the spans, by name, most time first; a call belongs where it began."""
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for event, own_ns in _own_times(events):
        if any(start <= event.start_ns < end for start, end in spans):
            calls[event.name] = calls.get(event.name, 0) + 1
            seconds[event.name] = seconds.get(event.name, 0.0) + own_ns / 1e9
    made = [Operation(name, kind_of(name), calls[name], seconds[name]) for name in calls]
    return sorted(made, key=lambda one: -one.seconds)


def kind_of(name: str) -> Kind:
    """Return what an operation is for, by its name."""
    if COMMUNICATION.search(name):
        return "communication"
    return "copy" if COPY.search(name) else "compute"


def _own_times(events: Iterable[Event]) -> list[tuple[Event, int]]:
    """Return each event with its nanoseconds outside the events that it contains on its thread."""
    own: dict[int, int] = {}
    threads: dict[tuple[Any, Any], list[tuple[int, Event]]] = {}
    ordered = sorted(events, key=lambda one: (one.start_ns, -one.end_ns))
    for number, event in enumerate(ordered):
        own[number] = event.end_ns - event.start_ns
        stack = threads.setdefault(event.thread, [])
        while stack and stack[-1][1].end_ns <= event.start_ns:
            stack.pop()
        if stack:
            own[stack[-1][0]] -= own[number]
        stack.append((number, event))
    return [(event, max(0, own[number])) for number, event in enumerate(ordered)]
