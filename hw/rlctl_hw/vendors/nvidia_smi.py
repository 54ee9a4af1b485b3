"""Read `nvidia-smi`: pure functions from its text to facts, and the one that asks it.

Cells may be `[N/A]`, `N/A` or an error in brackets; messages about a lost GPU may stand before a valid table;
unknown fields are refused on stdout. Columns are found by name.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace

from rlctl_hw.host import Host
from rlctl_hw.topology import ANSI
from rlctl_hw.types import Link

FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.reserved",
    "compute_cap",
    "memory.used",
    "pci.bus_id",
    "driver_version",
    "mig.mode.current",
    "fabric.state",
    "fabric.cliqueId",
    "fabric.clusterUuid",
    "gpu_recovery_action",
)
MIG_SLICE = re.compile(r"MIG\s+(?P<profile>\S+)\s+Device\s+\d+:\s*\(UUID:\s*(?P<uuid>MIG-[^)\s]+)\)")
GPU_LINE = re.compile(r"GPU\s+(?P<index>\d{1,4}):")
VERSION = re.compile(r"(?P<what>DRIVER|KMD|CUDA|CUDA UMD) version\s*:\s*(?P<number>\d+(\.\d+)+)", re.IGNORECASE)
"""`Driver Version` and `CUDA Version` until driver 610, which calls them `KMD Version` and `CUDA UMD Version`."""
NO_CLUSTER = "00000000-0000-0000-0000-000000000000"
PROFILE_GB = re.compile(r"\.(\d{1,4})gb")
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
    used_mib: float | None = None
    """Taken by processes, whoever started them."""
    pci: str | None = None
    """As sysfs writes it: `0000:83:00.0`."""
    fabric: Fabric | None = None
    recovery: str | None = None
    """What the driver asks for before the GPU works again: Reset, Reboot, Drain P2P."""


@dataclass(frozen=True)
class Fabric:
    """A GPU's place in an NVLink fabric with switches; GPUs of one cluster and clique reach each other over it."""

    state: str
    clique: int | None = None
    cluster: str | None = None
    """Set only where the fabric spans hosts."""


@dataclass(frozen=True)
class Answer:
    """The physical GPUs one source knows, and what went wrong on the way."""

    gpus: tuple[Gpu, ...]
    source: str
    errors: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    """Between GPUs by index; empty where the source was not asked."""
    cuda: str | None = None
    """Newest CUDA that the driver serves."""


def read(host: Host) -> Answer:
    """Ask nvidia-smi, leaving out fields this driver does not know."""
    fields = list(FIELDS)
    while True:
        result = host.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv"])
        unknown = parse_unknown_field(result.stdout)
        if unknown not in fields:
            break
        fields.remove(unknown)
    found = parse_query(result.stdout)
    # The tool repeats on stdout what it calls an error; without a table the message is all there is.
    errors = found.errors if found.gpus or result.error is None else (result.error,)
    gpus = found.gpus
    if any(gpu.mig_enabled for gpu in gpus):
        gpus = _with_slices(host, gpus)
    cuda = parse_versions(host.run(["nvidia-smi", "--version"]).stdout).get("cuda") if gpus else None
    return Answer(gpus, "nvidia-smi", errors, cuda=cuda or (_cuda_of_the_table(host) if gpus else None))


def parse_query(text: str) -> Answer:
    """Read `--query-gpu --format=csv`; rows of lost GPUs and lines before the header become errors."""
    lines = [ANSI.sub("", line).strip() for line in text.splitlines()]
    header_at = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if header_at is None:
        return Answer((), "nvidia-smi", tuple(line for line in lines[:1] if line))
    header = [column.split(" [")[0].strip() for column in lines[header_at].split(",")]
    gpus, errors = [], [line for line in lines[:header_at] if line]
    for line in filter(None, lines[header_at + 1 :]):
        cells = _cells(line)
        row = dict(zip(header, map(str.strip, cells), strict=False))
        gpu = _row(row) if len(cells) == len(header) else None
        if gpu is None:
            errors.append(", ".join(cells))
        else:
            gpus.append(gpu)
    return Answer(tuple(gpus), "nvidia-smi", tuple(errors))


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


def parse_slice_memory(text: str) -> dict[int, tuple[float, ...]]:
    """Read `nvidia-smi -q`: what processes can take of each MIG slice, in MiB, by the GPU's place in the listing."""
    sizes: dict[int, tuple[float, ...]] = {}
    gpu, section, total = -1, "", None
    for line in text.splitlines():
        key, separator, value = (part.strip() for part in line.partition(" : "))
        if re.match(r"GPU [0-9A-Fa-f]+:", line):
            gpu, section = gpu + 1, ""
        elif not separator:
            section = key
        elif section == "Shared FB Memory Usage" and key == "Total":
            total = parse_number(value)
        elif section == "Shared FB Memory Usage" and key == "Reserved" and total is not None:
            sizes[gpu] = (*sizes.get(gpu, ()), total - (parse_number(value) or 0.0))
    return sizes


def parse_versions(text: str) -> dict[str, str]:
    """Read `nvidia-smi --version` or the header of its table: `driver` and `cuda`, under their old or new names."""
    names = {"driver": "driver", "kmd": "driver", "cuda": "cuda", "cuda umd": "cuda"}
    return {names[found["what"].lower()]: found["number"] for found in VERSION.finditer(text)}


def parse_kernel_version(text: str) -> str | None:
    """Read /proc/driver/nvidia/version (`NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  …`)."""
    found = re.search(r"^NVRM version:.*?\s(\d{3}(?:\.\d+)+)\s", text, re.MULTILINE)
    return found.group(1) if found else None


def parse_bus_id(text: str | None) -> str | None:
    """Return a PCI address as sysfs writes it (`00000000:CB:00.0` becomes `0000:cb:00.0`)."""
    found = re.fullmatch(r"0{0,4}([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])", (text or "").strip().lower())
    return found.group(1) if found else None


def parse_unknown_field(text: str) -> str | None:
    """Return the field that this driver's tool refuses, if that is what it says."""
    found = re.search(r'Field "([^"]+)" is not a valid field', text)
    return found.group(1) if found else None


def parse_number(cell: str | None) -> float | None:
    """Read the number at the start of a cell (`81559 MiB`); None for N/A and messages."""
    found = re.match(r"\s*(\d+(?:\.\d+)?)(?:\s|$)", cell or "")
    return float(found.group(1)) if found else None


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], skipinitialspace=True))
    except csv.Error:
        return [line[:80]]


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
        used_mib=parse_number(row.get("memory.used")),
        pci=parse_bus_id(row.get("pci.bus_id")),
        fabric=_fabric(row),
        recovery=None if (action := _text(row.get("gpu_recovery_action"))) == "None" else action,
    )


def _fabric(row: dict[str, str]) -> Fabric | None:
    state = _text(row.get("fabric.state"))
    if state is None:
        return None
    clique, cluster = parse_number(row.get("fabric.cliqueId")), _text(row.get("fabric.clusterUuid"))
    return Fabric(state, None if clique is None else int(clique), None if cluster == NO_CLUSTER else cluster)


def _text(cell: str | None) -> str | None:
    """Return a cell's words; None for the many ways in which the tool says that it does not know."""
    if not cell or cell.strip("[]").lower() in ("n/a", "not supported", "unknown error", "gpu is lost"):
        return None
    return cell


def _with_slices(host: Host, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    named = parse_slices(host.run(["nvidia-smi", "-L"]).stdout)
    exact = parse_slice_memory(host.run(["nvidia-smi", "-q"]).stdout)
    found = []
    for place, gpu in enumerate(gpus):
        slices = named.get(gpu.index, ()) if gpu.mig_enabled else ()
        sizes = exact.get(place, ())
        if len(sizes) == len(slices):
            slices = tuple(replace(piece, memory_mib=size) for piece, size in zip(slices, sizes, strict=True))
        found.append(replace(gpu, slices=slices))
    return tuple(found)


def _cuda_of_the_table(host: Host) -> str | None:
    return parse_versions(host.run(["nvidia-smi"]).stdout).get("cuda")
