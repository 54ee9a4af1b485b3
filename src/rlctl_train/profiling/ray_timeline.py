"""Ray's own timeline of the recorded steps: every task and actor call of this run, by process, for Perfetto.

Ray keeps these events of a whole cluster, by node and process, without saying whose they are. The last bytes of a
task's id are its job's, and a process serves one job only.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from rlctl_train.profiling.steps import Span, read_steps
from rlctl_train.profiling.traces import TRACE

NAME = f"ray_timeline{TRACE}"
ARRIVED_WITHIN_S = 10.0
"""Longest wait for the last calls: processes report theirs every second."""
DRIVER = "driver"
Event = Mapping[str, Any]
"""A complete event as Ray has it: `pid` a node, `tid` kind and id of a process, `ts` and `dur` in microseconds."""


def keep(folder: Path, names: Mapping[str, str]) -> None:
    """Write the timeline of the steps recorded in `folder` there; where that fails say why, for a run outlives it.

    `names` are what a person calls each worker, by Ray's id of its process. All were called once more after the steps.
    """
    try:
        steps = read_steps(folder)
        span = steps[0].span[0], steps[-1].span[1]
        events = _arrived(ray.get_runtime_context().get_job_id(), names, span)
        with gzip.open(folder / NAME, "wt", encoding="utf-8", compresslevel=4) as file:
            json.dump(trace(events, names, span), file)
    except Exception as error:  # whatever goes wrong in Ray or on the disk, training goes on
        print(f"warning: no timeline of Ray: {type(error).__name__}: {error}", file=sys.stderr)


def of_job(events: Iterable[Event], job: str) -> list[Event]:
    """Return the events of the processes that serve a job."""
    events = list(events)
    whose: dict[str, set[bool]] = {}
    for event in events:
        if (task := event["args"].get("task_id")) is not None:
            whose.setdefault(event["tid"], set()).add(task.endswith(job))
    own = {process for process, found in whose.items() if found == {True}}
    return [event for event in events if event["tid"] in own or event["tid"].startswith(f"{DRIVER}:{job}")]


def trace(events: Iterable[Event], names: Mapping[str, str], span: Span) -> dict[str, Any]:
    """Return Chrome's trace of what lies in a span: the driver, then processes in the order of `names`, by name."""
    events = [event for event in events if _end_us(event) >= span[0] / 1e3 and event["ts"] <= span[1] / 1e3]
    nodes = {event["tid"]: event["pid"] for event in events}
    order = [DRIVER, *names]
    known = sorted(nodes, key=lambda process: _place(process, order))
    numbers = {process: number for number, process in enumerate(known, start=1)}
    made: list[dict[str, Any]] = []
    for process, number in numbers.items():
        called = DRIVER if process.startswith(DRIVER) else names.get(_id(process), process)
        for kind, value in (("name", {"name": f"{called} ({nodes[process]})"}), ("sort_index", {"sort_index": number})):
            made.append({"ph": "M", "name": f"process_{kind}", "pid": number, "tid": number, "args": value})
    made += [{**event, "pid": numbers[event["tid"]], "tid": numbers[event["tid"]]} for event in events]
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def _arrived(job: str, names: Mapping[str, str], span: Span) -> list[Event]:
    """Return the events of a job once every worker's call after the span is among them."""
    deadline = time.monotonic() + ARRIVED_WITHIN_S
    while True:
        events = of_job(ray.timeline() or (), job)  # which itself waits for a second
        late = names.keys() - {_id(event["tid"]) for event in events if event["ts"] > span[1] / 1e3}
        if not late:
            return events
        if time.monotonic() > deadline:
            missing = ", ".join(name for process, name in names.items() if process in late)
            print(f"warning: the timeline of Ray may lack the last calls of {missing}", file=sys.stderr)
            return events


def _end_us(event: Event) -> float:
    return event["ts"] + event["dur"]


def _id(process: str) -> str:
    return process.partition(":")[2]


def _place(process: str, order: Sequence[str]) -> tuple[int, str]:
    name = DRIVER if process.startswith(DRIVER) else _id(process)
    return (order.index(name) if name in order else len(order)), process
