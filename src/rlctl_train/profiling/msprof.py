"""What torch_npu's profiler writes of one step of one worker on Ascend: kernels, collectives (HCCL) and copies.

A folder `NAME_*_ascend_pt` holds the raw data of CANN's collector and, once analysed, `kernel_details.csv` with every
kernel and collective, and `trace_view.json`, Chrome's trace events, of which the copies are taken: what else the device
did is in the table. Without that table msprof's own serves, `op_summary_*.csv`, whose columns have longer names. Which
columns there are depends on level, metrics and version. Times are decimal microseconds of the unix clock. By
https://gitcode.com/Ascend/msprof, docs/en/user_guide/profile_data_file_references.md.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlctl_train.config.errors import UserError
from rlctl_train.profiling.traces import Event

FOLDER = "_ascend_pt"
KERNELS = "ASCEND_PROFILER_OUTPUT/kernel_details.csv"
SUMMARIES = "PROF_*/mindstudio_profiler_output/op_summary_*.csv"
TRACE = "ASCEND_PROFILER_OUTPUT/trace_view.json"
NAME, START, DURATION = (
    ("Name", "Op Name"),
    ("Start Time(us)", "Task Start Time(us)"),
    ("Duration(us)", "Task Duration(us)"),
)
"""Columns by what they hold: in the table of torch_npu, in msprof's own."""
UNKNOWN = "N/A"
HARDWARE = "Ascend Hardware"
"""The process of a trace whose threads are the device's streams."""
COPY = re.compile(r"mem(cpy|set)", re.I)
COLLECTIVE = re.compile(r"(hcom_[a-z]+)_[_\d]*", re.I)
"""What it is; group, count and index follow."""


def read_kernels(folder: Path) -> list[Event]:
    """Return kernels and collectives in unix time; raises UserError where nothing was analysed yet."""
    table = folder / KERNELS
    tables = [table] if table.exists() else sorted(folder.glob(SUMMARIES))
    if not tables:
        command = f"from torch_npu.profiler.profiler import analyse; analyse({str(folder)!r}, export_type=['text'])"
        raise UserError(f"{folder.name} has no {table.name}", f'where torch_npu is, run `python -c "{command}"`')
    return [event for path in tables for event in _kernels(path)]


def read_copies(folder: Path) -> list[Event]:
    """Return copies in unix time; none where there is no trace."""
    path = folder / TRACE
    return list(_copies(json.loads(path.read_text()))) if path.exists() else []


def _kernels(path: Path) -> Iterator[Event]:
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            name, start, duration = (_value(row, names) for names in (NAME, START, DURATION))
            if UNKNOWN in (start, duration):
                continue
            collective = COLLECTIVE.fullmatch(name)
            thread = "collectives" if collective else row.get("Stream ID")
            yield _event(collective[1] if collective else name, (row.get("Device_id"), thread), start, duration)


def _value(row: dict[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if row.get(name) is not None:
            return row[name].strip()
    raise ValueError(f"a row has no {' or '.join(names)}")


def _copies(trace: list[dict[str, Any]]) -> Iterator[Event]:
    named = (one for one in trace if one.get("ph") == "M" and one.get("name") == "process_name")
    hardware = {one["pid"] for one in named if one["args"]["name"] == HARDWARE}
    for one in trace:
        if one.get("ph") == "X" and one["pid"] in hardware and COPY.match(one["name"]):
            yield _event(one["name"], (one["pid"], one.get("tid")), str(one["ts"]), str(one["dur"]))


def _event(name: str, thread: tuple[Any, Any], start_us: str, duration_us: str) -> Event:
    start = _ns(start_us)
    return Event(name, thread, start, start + _ns(duration_us), on_device=True)


def _ns(text_us: str) -> int:
    """A float of microseconds since 1970 would be exact to a quarter of one."""
    return int(Decimal(text_us) * 1000)
