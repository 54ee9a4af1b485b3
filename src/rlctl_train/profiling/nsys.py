"""Reports of Nsight Systems, by their export to SQLite: kernels, graphs and copies with their times.

Tables are made only for what was recorded, and columns come and go between versions: what is missing is left out. Names
are numbers into `StringIds`. Times count from the session's start, which `TARGET_INFO_SESSION_START_TIME` gives in unix
time since 2023, and a range that the worker opens tells in older ones. A CUDA graph is one row, in a table of its own,
unless its nodes were asked for. Schema:
https://docs.nvidia.com/nsight-systems/UserGuide/index.html#sqlite-schema-reference
"""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from rlctl_train.config.errors import UserError
from rlctl_train.profiling.timeline import unix_start
from rlctl_train.profiling.traces import Event

REPORT, EXPORT = ".nsys-rep", ".sqlite"
KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
GRAPHS = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
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


def read_export(path: Path) -> list[Event]:
    """Return kernels, graphs and copies in unix time."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
        tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")}
        names = dict(base.execute("SELECT id, value FROM StringIds")) if "StringIds" in tables else {}
        rows = [*_kernels(base, tables, names), *_named(base, tables, GRAPHS, "CUDA graph"), *_copies(base, tables)]
        start = _start(path, base, tables, names) if rows else 0
        return [Event(name, place, start + begin, start + end, on_device=True) for name, place, begin, end in rows]


Row = tuple[str, tuple[int, int], int, int]
"""Name, device and stream, begin and end."""


def _kernels(base: sqlite3.Connection, tables: set[str], names: dict[int, str]) -> Iterator[Row]:
    if KERNELS not in tables:
        return
    there = _columns(base, KERNELS)
    name = next((column for column in ("shortName", "demangledName", "name") if column in there), "NULL")
    for number, *place, begin, end in base.execute(f"SELECT {name}, {_place(there)}, start, end FROM {KERNELS}"):
        yield names.get(number, str(number) if number is not None else "kernel"), (place[0], place[1]), begin, end


def _copies(base: sqlite3.Connection, tables: set[str]) -> Iterator[Row]:
    for table, word in COPIES.items():
        yield from _named(base, tables, table, word)


def _named(base: sqlite3.Connection, tables: set[str], table: str, word: str) -> Iterator[Row]:
    """Return the rows of a table that has no names."""
    if table not in tables:
        return
    there = _columns(base, table)
    kind = "copyKind" if "copyKind" in there else "NULL"
    for number, *place, begin, end in base.execute(f"SELECT {kind}, {_place(there)}, start, end FROM {table}"):
        yield f"{word} {COPY_KINDS.get(number, '')}".strip(), (place[0], place[1]), begin, end


def _place(there: set[str]) -> str:
    return ", ".join(column if column in there else "0" for column in ("deviceId", "streamId"))


def _start(path: Path, base: sqlite3.Connection, tables: set[str], names: dict[int, str]) -> int:
    """Return the unix time of the session's zero, in nanoseconds."""
    if START in tables and "utcEpochNs" in _columns(base, START):
        for (epoch,) in base.execute(f"SELECT utcEpochNs FROM {START}"):
            return int(epoch)
    return unix_start(path, _ranges(base, tables, names))


def _ranges(base: sqlite3.Connection, tables: set[str], names: dict[int, str]) -> Iterator[tuple[str | None, int]]:
    if RANGES not in tables:
        return
    there = _columns(base, RANGES)
    text = "text" if "text" in there else "NULL"
    number = "textId" if "textId" in there else "NULL"
    for written, key, begin in base.execute(f"SELECT {text}, {number}, start FROM {RANGES}"):
        yield written or names.get(key), begin


def _columns(base: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in base.execute(f"PRAGMA table_info({table})")}
