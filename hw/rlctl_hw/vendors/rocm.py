"""AMD: the kernel driver's files first, then `amd-smi`, `rocm-smi` and `rocminfo`; and what a process may use of it.

A partition of a card (CPX and its like) counts as a device with its share of memory and compute units; an MI250 is
two devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rlctl_hw.devices import by_key
from rlctl_hw.host import Found, Host
from rlctl_hw.types import Device, Fact, Link
from rlctl_hw.vendors import amd_smi, kfd, rocm_smi, rocminfo
from rlctl_hw.vendors.amd_gpu import WHOLE, Gpu, Physical, catalogue_of, name_of, product_of
from rlctl_hw.vendors.pci import BUS, find_gpus
from rlctl_hw.vendors.rocm_driver import read_driver
from rlctl_hw.vendors.rocm_visible import Visible, select_visible
from rlctl_hw.vendors.wiring import wire

GIB = 2**30
IN_USE_GIB = 0.5
"""A GPU with more than this taken is somebody's: an idle MI300X has 0.3 GiB taken."""
MIN_CARD_GIB = 4.0
"""Less is a GPU inside a CPU or a display's: nothing is trained there, and the host does better without it."""


def probe(host: Host) -> Found:
    """Return the GPUs a process may use; the physical ones are in the facts."""
    physical = read_driver(host) or _from_tools(host)
    visible = select_visible(physical.usable, host.env)
    devices, notes = _devices(visible.gpus)
    wiring = wire(devices, physical.links, physical.links_source)
    facts = _facts(host, physical, replace(visible, notes=visible.notes + notes), devices)
    return Found(devices, facts | wiring.facts, wiring.links, wiring.islands)


def _from_tools(host: Host) -> Physical:
    errors: list[str] = []
    for read, read_links in (
        (amd_smi.read, amd_smi.read_links),
        (rocm_smi.read, rocm_smi.read_links),
        (rocminfo.read, lambda _: {}),
    ):
        answer = read(host)
        if answer.gpus:
            links = _tool_links(read_links(host)) if len(answer.gpus) > 1 else ()
            return Physical(
                answer.gpus, answer.gpus, answer.source, tuple(errors), links, answer.source, driver=answer.driver
            )
        errors.extend(answer.errors)
    return Physical((), (), kfd.NODES, _why_none(host, errors))


def _tool_links(kinds: dict[tuple[int, int], str]) -> tuple[Link, ...]:
    pairs = {(min(pair), max(pair)): kind for pair, kind in kinds.items() if pair[0] != pair[1]}
    return tuple(Link(first, second, kind) for (first, second), kind in sorted(pairs.items()))


def _why_none(host: Host, errors: Sequence[str]) -> tuple[str, ...]:
    on_bus = find_gpus(host)
    told = [error for error in errors if not error.endswith("is not installed")]
    if on_bus and not host.exists("/sys/module/amdgpu"):
        return (f"{len(on_bus)} AMD GPUs are on the bus, but the driver amdgpu is not loaded: modprobe amdgpu", *told)
    if on_bus:
        return (f"{len(on_bus)} AMD GPUs are on the bus, but the driver amdgpu shows none for compute", *told)
    return tuple(told) or ("no AMD driver and no tool of ROCm here",)


def _devices(gpus: Iterable[Gpu]) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    devices, assumed, notes = [], [], []
    for gpu in gpus:
        memory_gib = gpu.memory_gib or _assumed_gib(gpu)
        if memory_gib is None:
            notes.append(f"GPU {gpu.index} ({name_of(gpu)}) does not tell its memory and is not in the catalogue")
        elif (own_gib := min(memory_gib, gpu.card_gib or memory_gib)) < MIN_CARD_GIB and gpu.partition is None:
            notes.append(f"GPU {gpu.index} ({name_of(gpu)}) is left out: {own_gib:.1f} GiB of its own are too few")
        else:
            devices.append(_device(gpu, memory_gib))
            assumed.extend([str(gpu.index)] if gpu.memory_gib is None else [])
    if assumed:
        notes.append(f"memory of GPU {', '.join(assumed)} is assumed from devices.toml: the driver does not tell it")
    return tuple(devices), tuple(notes)


def _assumed_gib(gpu: Gpu) -> float | None:
    """Return the catalogue's memory, for a partition as much of it as it has of the compute units."""
    key, product = catalogue_of(gpu), product_of(gpu)
    if key is None:
        return None
    share = gpu.compute_units / product.compute_units if product and gpu.compute_units else 1.0
    return by_key(key).memory_gib * min(1.0, share)


def _device(gpu: Gpu, memory_gib: float) -> Device:
    # The catalogue's figures are of the whole card, so a part of one has no row in it.
    whole = gpu.partition in WHOLE
    return Device(
        kind="rocm",
        index=gpu.index,
        name=name_of(gpu),
        memory_gib=memory_gib,
        uuid=gpu.uuid,
        catalogue=catalogue_of(gpu) if whole else None,
        architecture=gpu.architecture,
        partition=gpu.partition,
        pci=gpu.pci,
    )


def _facts(host: Host, physical: Physical, visible: Visible, devices: Iterable[Device]) -> dict[str, Fact]:
    facts = {
        "rocm.driver": _driver(host, physical),
        "rocm.runtime": _runtime(host),
        "rocm.physical": Fact(
            [f"{gpu.index}: {_described(gpu)}" for gpu in physical.gpus],
            physical.source,
            "; ".join(physical.errors) or None,
        ),
        "rocm.visible": Fact(
            [f"{device.index}: {device.name}" for device in devices], visible.source, "; ".join(visible.notes) or None
        ),
    }
    used = {str(gpu.index): round(gpu.used_gib, 2) for gpu in physical.gpus if gpu.used_gib is not None}
    if used:
        busy = [f"GPU {index}: {gib:g} GiB" for index, gib in used.items() if gib > IN_USE_GIB]
        facts["rocm.used_gib"] = Fact(used, physical.source, f"already in use: {', '.join(busy)}" if busy else None)
    if physical.missing:
        facts["rocm.missing"] = Fact(list(physical.missing), BUS, "on the bus, but the driver does not show them")
    if physical.withheld:
        facts["rocm.withheld"] = Fact(list(physical.withheld), "nodes that may not be read, and device files")
    models = {name_of(gpu) for gpu in physical.gpus}
    if len(models) > 1:
        facts["rocm.mixed"] = Fact(sorted(models), physical.source, "GPUs differ: a run is planned for the smallest")
    return facts


def _described(gpu: Gpu) -> str:
    return " ".join([name_of(gpu), *([gpu.partition] if gpu.partition else [])])


def _driver(host: Host, physical: Physical) -> Fact:
    module = "/sys/module/amdgpu"
    version = host.read(f"{module}/version")
    if version:
        return Fact(version, f"{module}/version")
    if physical.driver:
        return Fact(physical.driver, physical.source)
    if host.exists(module):
        # Only AMD's own package numbers its driver; the kernel's own goes by the kernel's version.
        kernel = host.read("/proc/sys/kernel/osrelease")
        return Fact(f"in-kernel {kernel}" if kernel else "in-kernel", module)
    return Fact(None, module, "amdgpu is not loaded")


def _runtime(host: Host) -> Fact:
    home = host.env.get("ROCM_PATH") or "/opt/rocm"
    for file in (f"{home}/.info/version", *reversed(host.glob("/opt/rocm-*/.info/version"))):
        version = host.read(file)
        if version:
            return Fact(version, file)
    return Fact(None, f"{home}/.info/version", "ROCm is not installed here")
