"""What rocprofv3 writes as CSV: kernels and copies of one worker, put on the unix clock by the ranges it marked.

Columns by https://rocm.docs.amd.com/projects/rocprofiler-sdk: a file is there only for what was traced, and columns
come and go between versions. Times count from the machine's start; a range that the worker's own timeline has too tells
the difference.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlctl_train.profiling.timeline import Range
from rlctl_train.profiling.traces import Event

KERNELS, COPIES, MARKERS = "_kernel_trace.csv", "_memory_copy_trace.csv", "_marker_api_trace.csv"


def read_csv(folder: Path, name: str, timeline: Sequence[Range]) -> list[Event]:
    """Return kernels and copies of the worker `name` in unix time; none where no file of its is there."""
    start = _start(folder / f"{name}{MARKERS}", timeline)
    found = [(row.get("Kernel_Name") or "kernel", row) for row in _rows(folder / f"{name}{KERNELS}")]
    found += [(f"Memcpy {row.get('Direction', '')}".strip(), row) for row in _rows(folder / f"{name}{COPIES}")]
    return [
        Event(
            what,
            ("device", row.get("Agent_Id")),
            start + int(row["Start_Timestamp"]),
            start + int(row["End_Timestamp"]),
            on_device=True,
        )
        for what, row in found
    ]


def _start(path: Path, timeline: Sequence[Range]) -> int:
    """Return the unix time of the machine's start, in nanoseconds; 0 where no range is shared."""
    for row in _rows(path):
        same = next((one for one in timeline if one.name == row.get("Function")), None)
        if same is not None:
            return same.start_ns - int(row["Start_Timestamp"])
    return 0


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.exists():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)
