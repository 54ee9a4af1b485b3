"""The survey: ask each vendor what this machine has, or read a machine elsewhere from its name (`h100-80gb:8x4`)."""

from __future__ import annotations

import importlib
import re

from rlctl_hw.devices import by_key
from rlctl_hw.host import Found, Host
from rlctl_hw.nics import nearest_devices, read_nics
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
HOST_GIB_PER_DEVICE_GIB = 1.5


def survey(host: Host | None = None) -> Hardware:
    """Return what this process can use; never raises, and says under `facts` what it could not learn."""
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
    """Return the machine that `DEVICE[:COUNT[xNODES]]` names; on CPU the count is cores.

    Host cores and memory of a machine that is elsewhere are assumed. Raises ValueError that says what is wrong.
    """
    match = SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(
            f"{spec!r} is not of the form DEVICE:COUNT or DEVICE:COUNTxNODES, such as h100-80gb:8x4 or cpu:2"
        )
    count, num_nodes = int(match["count"] or 1), int(match["nodes"] or 1)
    if match["name"].lower() == "cpu":
        return _cpu_machine(count, num_nodes)
    return _catalogue_machine(match["name"], count, num_nodes)


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
    devices = tuple(
        Device(entry.kind, i, entry.names[0], entry.memory_gib, None, entry.compute_capability) for i in range(count)
    )
    memory_gib = HOST_GIB_PER_DEVICE_GIB * entry.memory_gib * count
    cores = CORES_PER_DEVICE * count
    facts = {
        f"{entry.kind}.physical": Fact(entry.key, f"devices.toml, confidence {entry.confidence}"),
        "host.cores": Fact(cores, f"assumed: {CORES_PER_DEVICE} a device"),
        "host.memory_gib": Fact(memory_gib, f"assumed: {HOST_GIB_PER_DEVICE_GIB:g} times the devices' memory"),
        "host.shm_gib": Fact(memory_gib / 2, "assumed: half of the memory"),
    }
    return Hardware(devices, num_nodes, cores, memory_gib, memory_gib / 2, facts)
