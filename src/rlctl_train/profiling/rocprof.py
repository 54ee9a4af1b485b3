"""What rocprofv3 writes as CSV: kernels and copies of one process, put on the unix clock by the moments it marked.

Columns by https://rocm.docs.amd.com/projects/rocprofiler-sdk: a file is there only for what was traced, and columns
come and go between versions (streams since ROCm 7; agents as a number, then as `Agent 4`). Times count from the
machine's start.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from rlctl_train.profiling.timeline import unix_start
from rlctl_train.profiling.traces import Event

KERNELS, COPIES, MARKERS = "_kernel_trace.csv", "_memory_copy_trace.csv", "_marker_api_trace.csv"


def read_table(path: Path) -> list[Event]:
    """Return the kernels or copies of a table in unix time, by the markers of the same process beside it."""
    rows = list(_rows(path))
    if not rows:
        return []
    marks = path.with_name(path.name.removesuffix(KERNELS).removesuffix(COPIES) + MARKERS)
    start = unix_start(path, ((row["Function"], int(row["Start_Timestamp"])) for row in _rows(marks)))
    return [
        Event(
            row["Kernel_Name"] if "Kernel_Name" in row else f"Memcpy {row.get('Direction', '')}".strip(),
            (row.get("Agent_Id") or row.get("Destination_Agent_Id"), row.get("Stream_Id") or row.get("Queue_Id")),
            start + int(row["Start_Timestamp"]),
            start + int(row["End_Timestamp"]),
            on_device=True,
        )
        for row in rows
    ]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.exists():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)
