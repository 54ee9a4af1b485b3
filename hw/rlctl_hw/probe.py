"""The survey: ask each vendor what this machine has, or read a machine elsewhere by its name or its record."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlctl_hw.devices import by_key
from rlctl_hw.host import Found, Host
from rlctl_hw.nics import nearest_devices, read_nics
from rlctl_hw.plain import read_plain
from rlctl_hw.record import replay
from rlctl_hw.torch_view import torch_facts
from rlctl_hw.types import Device, Fact, Hardware
from rlctl_hw.vendors import cpu

VENDORS = {
    "cuda": "rlctl_hw.vendors.cuda:probe",
    "rocm": "rlctl_hw.vendors.rocm:probe",
    "ascend": "rlctl_hw.vendors.ascend:probe",
}
"""Accelerator vendors in the order they are asked; the first that has a device for this process is planned for."""

SPEC = re.compile(r"(?P<name>[^:\s]+)(?::(?P<count>[1-9]\d{0,4})(?:x(?P<nodes>[1-9]\d{0,4}))?)?")
CORES_PER_DEVICE = 8
CPU_GIB_PER_CORE, CPU_GIB_MIN = 4.0, 8.0
HOST_GIB_PER_DEVICE_GIB, HOST_GIB_LEAST = 1.5, 64.0


def survey(host: Host | None = None, *, deep: bool = False) -> Hardware:
    """Return what this process can use; never raises, and says under `facts` what it could not learn.

    `deep` starts a process that imports torch, which takes seconds.
    """
    host = host or Host()
    base = cpu.probe(host)
    facts, chosen = dict(base.facts), base
    for vendor in VENDORS:
        found = _ask(vendor, host)
        facts |= found.facts
        if found.devices:
            chosen = found
            break
    nics, nic_facts = read_nics(host)
    facts |= nic_facts
    if near := nearest_devices(host, nics, chosen.devices):
        facts["nics.near"] = near
    if deep:
        facts |= torch_facts(host)
    return Hardware(
        devices=chosen.devices,
        num_nodes=1,
        cpu_cores=facts["host.cores"].value or 1,
        host_memory_gib=facts["host.memory_gib"].value or 0.0,
        shm_gib=facts["host.shm_gib"].value or 0.0,
        facts=facts,
        links=chosen.links,
        islands=chosen.islands,
        nics=nics,
    )


def parse_hardware(spec: str) -> Hardware:
    """Return the machine that `DEVICE[:COUNT[xNODES]]` names (on CPU the count is cores), or that a file describes.

    A file is a folder of `rlctl hw --record` or the JSON of `rlctl hw -o json`. Host cores and memory of a named
    machine are assumed. Raises ValueError that says what is wrong.
    """
    if _is_path(spec):
        return _machine_at(Path(spec))
    match = SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(
            f"{spec!r} is not of the form DEVICE:COUNT or DEVICE:COUNTxNODES, such as h100-80gb:8x4 or cpu:2"
        )
    count, num_nodes = int(match["count"] or 1), int(match["nodes"] or 1)
    if match["name"].lower() == "cpu":
        return _cpu_machine(count, num_nodes)
    return _catalogue_machine(match["name"], count, num_nodes)


def read_hardware(data: Any) -> Hardware:
    """Return the machine that the JSON of `rlctl hw -o json` describes. Raises ValueError that says what is wrong."""
    if not isinstance(data, dict) or "hardware" not in data:
        raise ValueError("no survey: the field hardware is missing")
    found = read_plain(Hardware, data["hardware"], "hardware")
    if not found.devices:
        raise ValueError("hardware.devices is empty")
    if len({device.kind for device in found.devices}) > 1:
        raise ValueError("hardware.devices are of more than one kind")
    places = [place for group in found.islands for place in group]
    places += [place for link in found.links for place in (link.first, link.second)]
    if any(not 0 <= place < len(found.devices) for place in places):
        raise ValueError("hardware.links and hardware.islands name devices that are not listed")
    if min(found.num_nodes, found.cpu_cores) < 1:
        raise ValueError("hardware.num_nodes and hardware.cpu_cores start at 1")
    return found


def _is_path(spec: str) -> bool:
    # A device's name has none of these, so a folder called h100 in the way does no harm.
    return "/" in spec or spec.endswith(".json") or spec in (".", "..") or _is_record(spec)


def _is_record(spec: str) -> bool:
    try:
        return (Path(spec) / "record.json").is_file()
    except (OSError, ValueError):
        return False


def _machine_at(path: Path) -> Hardware:
    try:
        if path.is_dir():
            return survey(replay(path))
        return read_hardware(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _ask(vendor: str, host: Host) -> Found:
    module, _, attribute = VENDORS[vendor].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(host)
    # A driver in a bad state may answer anything; whatever it is must not stop a run that can do without it.
    except Exception as error:
        return Found((), {f"{vendor}.physical": Fact(None, vendor, f"{type(error).__name__}: {error}")})


def _cpu_machine(cores: int, num_nodes: int) -> Hardware:
    memory_gib = max(CPU_GIB_MIN, cores * CPU_GIB_PER_CORE)
    facts = {
        "host.cores": Fact(cores, "as named"),
        "host.memory_gib": Fact(memory_gib, f"assumed: {CPU_GIB_PER_CORE:g} GiB a core, at least {CPU_GIB_MIN:g}"),
        "host.shm_gib": Fact(memory_gib / 2, "assumed: half of the memory"),
    }
    return Hardware((Device("cpu", 0, "CPU", memory_gib),), num_nodes, cores, memory_gib, memory_gib / 2, facts)


def _catalogue_machine(name: str, count: int, num_nodes: int) -> Hardware:
    entry = by_key(name)
    device = Device(
        entry.kind,
        0,
        entry.names[0],
        entry.memory_gib,
        compute_capability=entry.compute_capability,
        catalogue=entry.key,
        architecture=None if entry.kind == "cuda" else entry.architecture,
    )
    memory_gib = max(HOST_GIB_LEAST, HOST_GIB_PER_DEVICE_GIB * entry.memory_gib * count)
    cores = CORES_PER_DEVICE * count
    facts = {
        f"{entry.kind}.physical": Fact(entry.key, f"devices.toml, confidence {entry.confidence}"),
        f"{entry.kind}.islands": Fact(entry.link, "devices.toml"),
        "host.cores": Fact(cores, f"assumed: {CORES_PER_DEVICE} a device"),
        "host.memory_gib": Fact(
            memory_gib, f"assumed: {HOST_GIB_PER_DEVICE_GIB:g} times the devices' memory, at least 64 GiB"
        ),
        "host.shm_gib": Fact(memory_gib / 2, "assumed: half of the memory"),
    }
    return Hardware(
        devices=tuple(replace(device, index=index) for index in range(count)),
        num_nodes=num_nodes,
        cpu_cores=cores,
        host_memory_gib=memory_gib,
        shm_gib=memory_gib / 2,
        facts=facts,
        islands=_usual_islands(count, 1 if entry.link == "PCIe" else entry.devices_per_node),
    )


def _usual_islands(count: int, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(start, min(start + size, count))) for start in range(0, count, size))
