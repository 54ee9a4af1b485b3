"""Tensors that come and go: the most that each phase had at one time, and who had asked for it.

Two sources tell of them: a trace of torch.profiler with memory (any device), by the operation that asked; and the
allocator's own history on CUDA, by the line of Python, which is also there after memory ran out. Sizes are those above
what there was when recording began.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlctl_train.profiling.spans import Span

GIB = 2**30
MOST = 6
"""Askers named per phase."""
SNAPSHOT, HISTORY = ".snapshot.pickle", ".allocations.json"
"""What of CUDA's allocator is kept: for https://pytorch.org/memory_viz, and for the report."""
MEMORY = "[memory]"
ALLOCATED, FREED = "alloc", "free_completed"
NOT_OURS = re.compile(r"/(torch|transformers|ray|contextlib)[/.]|^<|^\?\?")
"""Files whose lines are passed over on the way to the one that asked."""


@dataclass(frozen=True)
class Allocation:
    """A block that comes (`num_bytes` above 0) or goes."""

    at_ns: int
    address: int
    num_bytes: int
    asker: str


@dataclass(frozen=True)
class Peak:
    """The most that a phase had at one time, in GiB, with its largest askers."""

    gib: float
    by_asker: dict[str, float]


def peaks(allocations: Sequence[Allocation], spans: Mapping[str, Sequence[Span]]) -> dict[str, Peak]:
    """Return the peak of each phase; `allocations` in the order of time."""
    most = {name: _largest_at(allocations, inside) for name, inside in spans.items()}
    wanted = {number: name for name, (number, _) in most.items() if number is not None}
    found: dict[str, Peak] = {}
    there: dict[int, Allocation] = {}
    for number, one in enumerate(allocations):
        if one.num_bytes > 0:
            there[one.address] = one
        else:
            there.pop(one.address, None)
        if number in wanted:
            found[wanted[number]] = Peak(most[wanted[number]][1] / GIB, _by_asker(there.values()))
    return found


def of_trace(content: Mapping[str, Any]) -> list[Allocation]:
    """Return the allocations of a trace; the asker is the outermost operation around."""
    events = content.get("traceEvents", [])
    base = int(content.get("baseTimeNanoseconds", 0))
    on_device = any(one["args"].get("Device Type", 0) for one in events if one.get("name") == MEMORY)
    around: dict[Any, tuple[float, str]] = {}
    found = []
    for one in sorted(events, key=lambda one: (one.get("ts", 0), -one.get("dur", 0))):
        thread = one.get("tid")
        if one.get("cat") == "cpu_op" and one["ts"] >= around.get(thread, (0.0, ""))[0]:
            around[thread] = one["ts"] + one["dur"], one["name"]
        elif one.get("name") == MEMORY and bool(one["args"].get("Device Type", 0)) == on_device:
            end, name = around.get(thread, (0.0, ""))
            asker = name if one["ts"] <= end else "outside of operations"
            size, address = int(one["args"]["Bytes"]), int(one["args"]["Addr"])
            found.append(Allocation(base + round(one["ts"] * 1000), address, size, asker))
    return found


def of_snapshot(snapshot: Mapping[str, Any]) -> list[Allocation]:
    """Return the history of the allocator that `torch.cuda.memory._snapshot` returns; none where none was kept."""
    kept = [one for trace in snapshot.get("device_traces", ()) for one in trace if one["action"] in (ALLOCATED, FREED)]
    return [
        Allocation(
            int(one.get("time_us", 0)) * 1000,
            int(one["addr"]),
            int(one["size"]) * (1 if one["action"] == ALLOCATED else -1),
            line_of(one.get("frames", ())),
        )
        for one in sorted(kept, key=lambda one: one.get("time_us", 0))
    ]


def line_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return the innermost line of a stack that is not a library's, as `file.py:12 function`."""
    known = [one for one in frames if one["filename"].endswith(".py")]
    ours = next((one for one in known if not NOT_OURS.search(one["filename"])), known[0] if known else None)
    return "no stack" if ours is None else f"{ours['filename'].rsplit('/', 1)[-1]}:{ours['line']} {ours['name']}"


def _largest_at(allocations: Sequence[Allocation], inside: Sequence[Span]) -> tuple[int | None, int]:
    """Return the number of the allocation at which a phase had most, and how many bytes that was."""
    held, best, most = 0, None, 0
    for number, one in enumerate(allocations):
        held += one.num_bytes
        if held > most and any(start <= one.at_ns < end for start, end in inside):
            best, most = number, held
    return best, most


def _by_asker(there: Iterable[Allocation]) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for one in there:
        sizes[one.asker] = sizes.get(one.asker, 0.0) + one.num_bytes / GIB
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:MOST]
    return dict(largest)
