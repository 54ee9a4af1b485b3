"""NVIDIA: NVML first, `nvidia-smi` as fallback, and what `CUDA_VISIBLE_DEVICES` leaves of it.

MIG: a process sees one slice only, and slices do not reach each other, so a slice counts as a machine with a single
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import pynvml

from rlctl_hw.devices import by_printed_name
from rlctl_hw.host import Found, Host
from rlctl_hw.topology import Topology, among, is_complete, islands, parse_topo
from rlctl_hw.types import Device, Fact, Link
from rlctl_hw.vendors import nvidia_smi, nvml
from rlctl_hw.vendors.nvidia_smi import Answer, Gpu, MigSlice
from rlctl_hw.visibility import Name, select

VISIBLE = "CUDA_VISIBLE_DEVICES"
MODULE, KERNEL = "/sys/module/nvidia/version", "/proc/driver/nvidia/version"
MIB_PER_GIB = 1024
IN_USE_GIB = 0.5
"""A GPU with more than this taken is somebody's: a display or a monitor takes less."""


@dataclass(frozen=True)
class Visible:
    """Devices that CUDA gives to a process, and why others are left out."""

    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wiring:
    """The links and islands among visible devices."""

    links: tuple[Link, ...]
    islands: tuple[tuple[int, ...], ...]
    facts: dict[str, Fact]


def probe(host: Host, library: Any = pynvml) -> Found:
    """Return the GPUs a process may use; the physical ones are in the facts."""
    answer = nvml.read(host, library)
    if not answer.gpus:
        fallback = nvidia_smi.read(host)
        answer = replace(fallback, errors=answer.errors + fallback.errors)
    visible = select_visible(answer.gpus, host.env.get(VISIBLE))
    wiring = _wiring(host, answer, visible.devices)
    facts = _facts(host, answer, visible) | _states(answer) | wiring.facts
    return Found(visible.devices, facts, wiring.links, wiring.islands)


def select_visible(gpus: Sequence[Gpu], setting: str | None) -> Visible:
    """Apply `CUDA_VISIBLE_DEVICES` (indices, `GPU-` or `MIG-` UUIDs or their beginnings) as CUDA does."""
    slices = [replace(gpu, slices=(piece,)) for gpu in gpus for piece in gpu.slices]
    names = [Name(gpu.index, gpu.uuid) for gpu in gpus] + [Name(None, gpu.slices[0].uuid) for gpu in slices]
    chosen = select(VISIBLE, setting, names)
    shown = _usable([(*gpus, *slices)[place] for place in chosen.places])
    return shown if chosen.note is None else replace(shown, notes=(chosen.note, *shown.notes))


def _usable(chosen: list[Gpu]) -> Visible:
    """Turn GPUs into devices: whole ones, or the first MIG slice alone."""
    if chosen and chosen[0].mig_enabled:
        first = chosen[0]
        if not first.slices:
            return Visible((), (f"GPU {first.index} is in MIG mode and has no slice",))
        return Visible((_slice_device(first, first.slices[0]),), ("CUDA shows one MIG slice to a process",))
    devices, notes = [], []
    for gpu in chosen:
        memory_gib = _memory_gib(gpu)
        if gpu.mig_enabled:
            notes.append(f"GPU {gpu.index} is in MIG mode and cannot serve beside whole GPUs")
        elif gpu.recovery:
            notes.append(f"GPU {gpu.index} is in error; the driver asks for: {gpu.recovery}")
        elif memory_gib is None:
            notes.append(f"GPU {gpu.index} ({gpu.name}) does not tell its memory and is not in the catalogue")
        else:
            devices.append(_whole_device(gpu, memory_gib))
    return Visible(tuple(devices), tuple(notes))


def _whole_device(gpu: Gpu, memory_gib: float) -> Device:
    entry = by_printed_name(gpu.name)
    key = entry.key if entry else None
    return Device("cuda", gpu.index, gpu.name, memory_gib, gpu.uuid, _capability(gpu), key, pci=gpu.pci)


def _slice_device(gpu: Gpu, piece: MigSlice) -> Device:
    # The catalogue's figures are of the whole GPU, so a slice has no row in it.
    return Device(
        "cuda",
        gpu.index,
        f"{gpu.name} MIG {piece.profile}",
        piece.memory_mib / MIB_PER_GIB,
        piece.uuid,
        _capability(gpu),
        partition=piece.profile,
        pci=gpu.pci,
    )


def _memory_gib(gpu: Gpu) -> float | None:
    if gpu.memory_mib is not None:
        return gpu.memory_mib / MIB_PER_GIB
    entry = by_printed_name(gpu.name)
    return entry.memory_gib if entry else None


def _capability(gpu: Gpu) -> str | None:
    entry = by_printed_name(gpu.name)
    return gpu.compute_capability or (entry.compute_capability if entry else None)


def _wiring(host: Host, answer: Answer, devices: Sequence[Device]) -> Wiring:
    """Return how visible GPUs reach each other, from NVML or else from `nvidia-smi topo -m`."""
    if not devices:
        return Wiring((), (), {})
    if len(devices) == 1:
        return Wiring((), ((0,),), {})
    indices, source, topology, error = [device.index for device in devices], answer.source, Topology(answer.links), None
    links = among(indices, topology.links)
    if not is_complete(len(devices), links):
        result = host.run(["nvidia-smi", "topo", "-m"])
        source, topology, error = "nvidia-smi topo -m", parse_topo(result.stdout), result.error
        links = among(indices, topology.links)
    facts = {}
    if topology.nics:
        facts["cuda.nics"] = Fact(topology.nics, source)
    if not is_complete(len(devices), links):
        facts["cuda.islands"] = Fact(None, source, error or "no link is told for some pairs of GPUs")
        return Wiring(links, (), facts)
    groups = islands(len(devices), links)
    facts["cuda.islands"] = Fact([[indices[place] for place in group] for group in groups], source)
    return Wiring(links, groups, facts)


def _facts(host: Host, answer: Answer, visible: Visible) -> dict[str, Fact]:
    driver = _driver(host, answer)
    errors = "; ".join(answer.errors) or None
    if driver.value and not answer.gpus:
        errors = f"the driver {driver.value} is loaded, but no GPU answered; {errors}"
    facts = {
        "cuda.driver": driver,
        "cuda.physical": Fact([f"{gpu.index}: {gpu.name}" for gpu in answer.gpus], answer.source, errors),
        "cuda.visible": _visible(host, visible),
    }
    if answer.cuda:
        facts["cuda.runtime"] = Fact(answer.cuda, answer.source)
    facts |= _unseen(host, answer)
    if len({gpu.name for gpu in answer.gpus}) > 1 and host.env.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        facts["cuda.order"] = Fact(
            None, "CUDA_DEVICE_ORDER", "GPUs differ and CUDA counts the fastest first; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return facts


def _driver(host: Host, answer: Answer) -> Fact:
    if version := host.read(MODULE):
        return Fact(version, MODULE)
    if version := nvidia_smi.parse_kernel_version(host.read(KERNEL) or ""):
        return Fact(version, KERNEL)
    told = next((gpu.driver_version for gpu in answer.gpus if gpu.driver_version), None)
    return Fact(told, answer.source) if told else Fact(None, MODULE, "the NVIDIA driver is not loaded")


def _unseen(host: Host, answer: Answer) -> dict[str, Fact]:
    """Return the GPUs that the kernel's driver knows and its library does not: lost, or kept from this container."""
    source = "/proc/driver/nvidia/gpus"
    known = {PurePosixPath(path).name.lower() for path in host.glob(f"{source}/*")}
    missing = sorted(known - {gpu.pci for gpu in answer.gpus})
    if not missing or len(known) <= len(answer.gpus):
        return {}
    # A container gets a device file for each GPU it may use.
    if len(host.glob("/dev/nvidia[0-9]*")) > len(answer.gpus):
        return {"cuda.missing": Fact(missing, source, "the driver knows GPUs that do not answer")}
    return {"cuda.withheld": Fact(missing, f"{source}: there are no device files for these")}


def _visible(host: Host, visible: Visible) -> Fact:
    setting = host.env.get(VISIBLE)
    return Fact(
        [f"{device.index}: {device.name}" for device in visible.devices],
        "all" if setting is None else f"{VISIBLE}={setting}",
        "; ".join(visible.notes) or None,
    )


def _states(answer: Answer) -> dict[str, Fact]:
    """Return what else the GPUs say: memory already taken, and their NVLink fabric."""
    facts = {}
    used = {str(gpu.index): round(gpu.used_mib / MIB_PER_GIB, 2) for gpu in answer.gpus if gpu.used_mib is not None}
    busy = [f"GPU {index}: {gib:g} GiB" for index, gib in used.items() if gib > IN_USE_GIB]
    if used:
        facts["cuda.used_gib"] = Fact(used, answer.source, f"already in use: {', '.join(busy)}" if busy else None)
    fabric = [(gpu.index, gpu.fabric) for gpu in answer.gpus if gpu.fabric]
    if fabric:
        waiting = [str(index) for index, place in fabric if place.state != "Completed"]
        facts["cuda.fabric"] = Fact(
            sorted(
                {f"{place.state}, clique {place.clique}, cluster {place.cluster or 'this host'}" for _, place in fabric}
            ),
            answer.source,
            f"GPU {', '.join(waiting)}: NVLink is not ready; is nvidia-fabricmanager running?" if waiting else None,
        )
    return facts
