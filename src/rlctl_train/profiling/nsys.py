"""Reports of Nsight Systems, by their export to SQLite: kernels and copies with their times.

Tables are made only for what was recorded, and columns come and go between versions: what is missing is left out. Names
are numbers into `StringIds`. Times count from the session's start, which `TARGET_INFO_SESSION_START_TIME` gives in unix
time since 2023; where it is missing, a range that the worker's own timeline has too tells the difference. Schema:
https://docs.nvidia.com/nsight-systems/UserGuide/index.html#sqlite-schema-reference
"""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from rlctl_train.config.errors import UserError
from rlctl_train.profiling.timeline import Range
from rlctl_train.profiling.traces import Event

REPORT, EXPORT = ".nsys-rep", ".sqlite"
KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": "Memcpy", "CUPTI_ACTIVITY_KIND_MEMSET": "Memset"}
COPY_KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}
"""CUpti_ActivityMemcpyKind."""
START = "TARGET_INFO_SESSION_START_TIME"
RANGES = "NVTX_EVENTS"


def export_command(report: Path) -> list[str]:
    """Return the command that makes the export of a report, beside it."""
    target = report.with_suffix(EXPORT)
    return ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={target}", str(report)]


def export(report: Path) -> Path:
    """Make the export unless it is there; raises UserError where nsys is not there or fails."""
    target = report.with_suffix(EXPORT)
    if target.exists():
        return target
    command = export_command(report)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        remedy = f"run `{' '.join(command)}` where Nsight Systems is, and ask again"
        raise UserError(f"{report.name} can be read only with nsys, which is not on PATH", remedy) from None
    if done.returncode or not target.exists():
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"nsys cannot export {report}: {said[-1] if said else 'no reason given'}", "try it by hand")
    return target


def read_export(path: Path, timeline: Sequence[Range]) -> list[Event]:
    """Return kernels and copies in unix time; `timeline` is the worker's own."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
        tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}
        names = dict(base.execute("SELECT id, value FROM StringIds")) if "StringIds" in tables else {}
        start = _start(base, tables, names, timeline)
        return [
            Event(name, ("device", device), start + begin, start + end, on_device=True)
            for name, device, begin, end in [*_kernels(base, tables, names), *_copies(base, tables)]
        ]


Row = tuple[str, int, int, int]
"""Name, device, begin and end."""


def _kernels(base: sqlite3.Connection, tables: set[str], names: dict[int, str]) -> Iterator[Row]:
    if KERNELS not in tables:
        return
    there = _columns(base, KERNELS)
    name = next((column for column in ("shortName", "demangledName", "name") if column in there), None)
    device = "deviceId" if "deviceId" in there else "0"
    for number, where, begin, end in base.execute(f"SELECT {name or 'NULL'}, {device}, start, end FROM {KERNELS}"):
        yield names.get(number, str(number) if number is not None else "kernel"), where, begin, end


def _copies(base: sqlite3.Connection, tables: set[str]) -> Iterator[Row]:
    for table, word in COPIES.items():
        if table not in tables:
            continue
        there = _columns(base, table)
        kind = "copyKind" if "copyKind" in there else "NULL"
        device = "deviceId" if "deviceId" in there else "0"
        for number, where, begin, end in base.execute(f"SELECT {kind}, {device}, start, end FROM {table}"):
            yield f"{word} {COPY_KINDS.get(number, '')}".strip(), where, begin, end


def _start(base: sqlite3.Connection, tables: set[str], names: dict[int, str], timeline: Sequence[Range]) -> int:
    """Return the unix time of the session's zero, in nanoseconds."""
    if START in tables and "utcEpochNs" in _columns(base, START):
        for (epoch,) in base.execute(f"SELECT utcEpochNs FROM {START}"):
            return int(epoch)
    if RANGES in tables:
        there = _columns(base, RANGES)
        text = "text" if "text" in there else "NULL"
        number = "textId" if "textId" in there else "NULL"
        for written, key, begin in base.execute(f"SELECT {text}, {number}, start FROM {RANGES} ORDER BY start"):
            name = written or names.get(key)
            same = next((one for one in timeline if one.name == name), None)
            if same is not None:
                return same.start_ns - begin
    return 0


def _columns(base: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in base.execute(f"PRAGMA table_info({table})")}
