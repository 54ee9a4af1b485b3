"""`amd-smi`, the fallback where the kernel driver's own files tell too little: parsers from its text to facts.

The document is a list, one object, or an object with `gpu_data`, as versions go; cells may be `N/A`; a size is a
number, or a value with a unit ("MB" means MiB).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlctl_hw.host import Host, first_line
from rlctl_hw.vendors.amd_gpu import Answer, Gpu, uuid_of
from rlctl_hw.vendors.loose_json import lowered, number, parse_document, records, words
from rlctl_hw.vendors.tools import ROCM_FOLDERS, run_tool

STATIC = ("amd-smi", "static", "--asic", "--bus", "--vram", "--driver", "--json")
TOPOLOGY = ("amd-smi", "topology", "--json")
UNIT_BYTES = {"b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "kib": 2**10, "mib": 2**20, "gib": 2**30}
GIB = 2**30


def read(host: Host) -> Answer:
    """Ask for what the GPUs are; `amd-smi` may answer with a message and exit code 0."""
    result = run_tool(host, STATIC, ROCM_FOLDERS)
    answer = parse_static(result.stdout)
    if answer.gpus:
        return answer
    return Answer((), "amd-smi", (result.error or f"amd-smi: {first_line(result.stdout) or 'said nothing'}",))


def read_links(host: Host) -> dict[tuple[int, int], str]:
    """Ask for the ways between the GPUs."""
    return parse_topology(run_tool(host, TOPOLOGY, ROCM_FOLDERS).stdout)


def parse_static(text: str) -> Answer:
    """Read `amd-smi static --json`."""
    gpus: list[Gpu] = []
    driver = None
    for entry in _entries(parse_document(text)):
        index = number(entry.get("gpu"))
        if index is None:
            continue
        gpus.append(_gpu(index, entry))
        driver = driver or words(_part(entry, "driver").get("version"))
    return Answer(tuple(gpus), "amd-smi", driver=driver)


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """Read `amd-smi topology --json`: kind of link (XGMI, PCIE) by pairs of GPU indices."""
    kinds = {}
    for entry in _entries(parse_document(text)):
        first = number(entry.get("gpu"))
        for link in records(entry.get("links")):
            second, kind = number(link.get("gpu")), words(link.get("link_type"))
            if first is not None and second is not None and first != second and kind:
                kinds[first, second] = kind.upper()
    return kinds


def _entries(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict) and "gpu_data" in document:
        document = document["gpu_data"]
    return records(document)


def _gpu(index: int, entry: dict[str, Any]) -> Gpu:
    asic = _part(entry, "asic")
    serial = number(asic.get("asic_serial"))
    size = _bytes(_part(entry, "vram")) or _bytes(entry)
    return Gpu(
        index=index,
        name=words(asic.get("market_name")),
        memory_gib=size / GIB if size else None,
        architecture=words(asic.get("target_graphics_version")),
        device_id=number(asic.get("device_id")),
        compute_units=number(asic.get("num_compute_units")),
        uuid=uuid_of(serial) if serial else None,
        pci=lowered(_part(entry, "bus").get("bdf")),
        partition=words(_part(entry, "partition").get("compute_partition")),
    )


def _bytes(vram: dict[str, Any]) -> int | None:
    size = vram.get("size", vram.get("vram_size", vram.get("vram_size_mb")))
    unit = "mb"
    if isinstance(size, dict):
        size, unit = size.get("value"), (words(size.get("unit")) or unit).lower()
    amount = number(size)
    return None if amount is None or unit not in UNIT_BYTES else amount * UNIT_BYTES[unit]


def _part(entry: dict[str, Any], name: str) -> dict[str, Any]:
    part = entry.get(name)
    return part if isinstance(part, dict) else {}
