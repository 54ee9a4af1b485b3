"""Read `nvidia-smi`: pure functions from its text to facts, and the one that asks it.

Cells may be `[N/A]`, `N/A` or an error in brackets; messages about a lost GPU may stand before a valid table;
unknown fields are refused on stdout. Columns are found by name.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace

from rlctl_hw.host import Host, first_line

FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.reserved",
    "compute_cap",
    "driver_version",
    "mig.mode.current",
)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MIG_SLICE = re.compile(r"MIG\s+(?P<profile>\S+)\s+Device\s+\d+:\s*\(UUID:\s*(?P<uuid>MIG-[^)\s]+)\)")
GPU_LINE = re.compile(r"GPU\s+(?P<index>\d+):")
PROFILE_GB = re.compile(r"\.(\d+)gb")
PROFILE_USABLE_SHARE = 0.97
"""Slices report a little less than their profile's name says."""


@dataclass(frozen=True)
class MigSlice:
    """One MIG device of a GPU."""

    uuid: str
    profile: str
    memory_mib: float


@dataclass(frozen=True)
class Gpu:
    """One physical GPU; `memory_mib` is what processes can take (total less the driver's reserve)."""

    index: int
    name: str
    uuid: str | None = None
    memory_mib: float | None = None
    compute_capability: str | None = None
    driver_version: str | None = None
    mig_enabled: bool = False
    slices: tuple[MigSlice, ...] = ()


@dataclass(frozen=True)
class Table:
    """The GPUs of a query and the messages around it."""

    gpus: tuple[Gpu, ...]
    errors: tuple[str, ...] = ()


def read(host: Host) -> Table:
    """Ask nvidia-smi, leaving out fields this driver does not know."""
    fields = list(FIELDS)
    while True:
        result = host.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv"])
        unknown = parse_unknown_field(result.stdout)
        if unknown not in fields:
            break
        fields.remove(unknown)
    slices = {}
    table = parse_query(result.stdout)
    if any(gpu.mig_enabled for gpu in table.gpus):
        slices = parse_slices(host.run(["nvidia-smi", "-L"]).stdout)
    gpus = tuple(_with_slices(gpu, slices) for gpu in table.gpus)
    # The tool repeats on stdout what it calls an error; without a table the message is all there is.
    errors = table.errors if gpus or result.error is None else (result.error,)
    return Table(gpus, errors)


def parse_query(text: str) -> Table:
    """Read `--query-gpu --format=csv`; rows of lost GPUs and lines before the header become errors."""
    lines = [ANSI.sub("", line).strip() for line in text.splitlines()]
    header_at = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if header_at is None:
        return Table((), tuple(first_line(line) for line in lines[:1] if line))
    header = [column.split(" [")[0].strip() for column in lines[header_at].split(",")]
    gpus, errors = [], [line for line in lines[:header_at] if line]
    for cells in csv.reader([line for line in lines[header_at + 1 :] if line], skipinitialspace=True):
        row = dict(zip(header, map(str.strip, cells), strict=False))
        gpu = _row(row) if len(cells) == len(header) else None
        if gpu is None:
            errors.append(", ".join(cells))
        else:
            gpus.append(gpu)
    return Table(tuple(gpus), tuple(errors))


def parse_slices(text: str) -> dict[int, tuple[MigSlice, ...]]:
    """Read `nvidia-smi -L`: MIG slices by GPU index, memory from the profile's name (`3g.40gb`)."""
    slices: dict[int, tuple[MigSlice, ...]] = {}
    index = None
    for line in text.splitlines():
        if gpu := GPU_LINE.match(line.strip()):
            index = int(gpu["index"])
        elif (piece := MIG_SLICE.search(line)) and index is not None and (size := PROFILE_GB.search(piece["profile"])):
            memory_mib = int(size.group(1)) * 1024 * PROFILE_USABLE_SHARE
            slices[index] = (*slices.get(index, ()), MigSlice(piece["uuid"], piece["profile"], memory_mib))
    return slices


def parse_unknown_field(text: str) -> str | None:
    """Return the field that this driver's tool refuses, if that is what it says."""
    found = re.search(r'Field "([^"]+)" is not a valid field', text)
    return found.group(1) if found else None


def parse_number(cell: str | None) -> float | None:
    """Read the number at the start of a cell (`81559 MiB`); None for N/A and messages."""
    found = re.match(r"\s*(\d+(?:\.\d+)?)(?:\s|$)", cell or "")
    return float(found.group(1)) if found else None


def _is_header(line: str) -> bool:
    names = {column.split(" [")[0].strip() for column in line.split(",")}
    return {"index", "name"} <= names


def _row(row: dict[str, str]) -> Gpu | None:
    index, total = parse_number(row["index"]), parse_number(row.get("memory.total"))
    name = _text(row["name"])
    if index is None or name is None:
        return None
    reserved = parse_number(row.get("memory.reserved")) or 0.0
    capability = _text(row.get("compute_cap"))
    return Gpu(
        index=int(index),
        name=name,
        uuid=_text(row.get("uuid")),
        memory_mib=None if total is None else total - reserved,
        compute_capability=capability if capability and re.fullmatch(r"\d+\.\d+", capability) else None,
        driver_version=_text(row.get("driver_version")),
        mig_enabled=row.get("mig.mode.current") == "Enabled",
    )


def _text(cell: str | None) -> str | None:
    """Return a cell's words; None for the many ways in which the tool says that it does not know."""
    if not cell or cell.strip("[]").lower() in ("n/a", "not supported", "unknown error", "gpu is lost"):
        return None
    return cell


def _with_slices(gpu: Gpu, slices: dict[int, tuple[MigSlice, ...]]) -> Gpu:
    return replace(gpu, slices=slices.get(gpu.index, ())) if gpu.mig_enabled else gpu
