"""NVIDIA: NVML first, `nvidia-smi` as fallback, and what `CUDA_VISIBLE_DEVICES` leaves of it.

MIG: a process sees one slice only, so a slice counts as a machine with a single device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pynvml

from rlctl_hw.devices import by_printed_name
from rlctl_hw.host import Found, Host
from rlctl_hw.types import Device, Fact
from rlctl_hw.vendors import nvidia_smi
from rlctl_hw.vendors.nvidia_smi import Gpu, MigSlice

GIB = 2**30
MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Answer:
    """The physical GPUs one source knows, and what went wrong on the way."""

    gpus: tuple[Gpu, ...]
    source: str
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Visible:
    """Devices that CUDA gives to a process, and why others are left out."""

    devices: tuple[Device, ...]
    notes: tuple[str, ...] = field(default=())


def probe(host: Host, nvml: Any = pynvml) -> Found:
    """Return the GPUs a process may use; the physical ones are in the facts."""
    answer = read_nvml(nvml)
    if not answer.gpus:
        fallback = nvidia_smi.read(host)
        answer = Answer(fallback.gpus, "nvidia-smi", answer.errors + fallback.errors)
    setting = host.env.get("CUDA_VISIBLE_DEVICES")
    visible = select_visible(answer.gpus, setting)
    return Found(visible.devices, _facts(host, answer, setting, visible))


def read_nvml(nvml: Any = pynvml) -> Answer:
    """Ask the driver's library; a GPU that does not answer is left out and named in the errors."""
    try:
        nvml.nvmlInit()
    except (pynvml.NVMLError, OSError) as error:
        return Answer((), "NVML", (f"NVML: {error}",))
    gpus, errors = [], []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                gpus.append(_gpu(nvml, index, nvml.nvmlDeviceGetHandleByIndex(index)))
            except pynvml.NVMLError as error:
                errors.append(f"NVML, GPU {index}: {error}")
    except pynvml.NVMLError as error:
        errors.append(f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()
    return Answer(tuple(gpus), "NVML", tuple(errors))


def select_visible(gpus: Iterable[Gpu], setting: str | None) -> Visible:
    """Apply `CUDA_VISIBLE_DEVICES` (indices, `GPU-` or `MIG-` UUIDs or their beginnings) as CUDA does.

    The list ends at the first entry that names nothing; an entry named twice leaves no device at all.
    """
    gpus = tuple(gpus)
    if setting is None:
        chosen: list[Gpu] = list(gpus)
    else:
        chosen = []
        for entry in setting.split(","):
            match = _named(gpus, entry.strip())
            if match is None:
                break
            if match in chosen:
                return Visible((), (f"CUDA_VISIBLE_DEVICES={setting!r} names a device twice: CUDA then shows none",))
            chosen.append(match)
    return _usable(chosen)


def _named(gpus: tuple[Gpu, ...], entry: str) -> Gpu | None:
    """Return the GPU an entry names; for a MIG UUID, its GPU with that slice only."""
    if entry.startswith("GPU-"):
        return _only([gpu for gpu in gpus if gpu.uuid and gpu.uuid.startswith(entry)])
    if entry.startswith("MIG-"):
        return _only(
            [replace(gpu, slices=(piece,)) for gpu in gpus for piece in gpu.slices if piece.uuid.startswith(entry)]
        )
    if not (entry.isascii() and entry.isdigit()):
        return None
    return next((gpu for gpu in gpus if gpu.index == int(entry)), None)


def _only(matches: list[Gpu]) -> Gpu | None:
    return matches[0] if len(matches) == 1 else None


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
        elif memory_gib is None:
            notes.append(f"GPU {gpu.index} ({gpu.name}) does not tell its memory and is not in the catalogue")
        else:
            devices.append(Device("cuda", gpu.index, gpu.name, memory_gib, gpu.uuid, _capability(gpu)))
    return Visible(tuple(devices), tuple(notes))


def _slice_device(gpu: Gpu, piece: MigSlice) -> Device:
    return Device(
        "cuda",
        gpu.index,
        f"{gpu.name} MIG {piece.profile}",
        piece.memory_mib / MIB_PER_GIB,
        piece.uuid,
        _capability(gpu),
    )


def _memory_gib(gpu: Gpu) -> float | None:
    if gpu.memory_mib is not None:
        return gpu.memory_mib / MIB_PER_GIB
    entry = by_printed_name(gpu.name)
    return entry.memory_gib if entry else None


def _capability(gpu: Gpu) -> str | None:
    entry = by_printed_name(gpu.name)
    return gpu.compute_capability or (entry.compute_capability if entry else None)


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    mig = _ask(nvml.nvmlDeviceGetMigMode, handle)
    mig_enabled = mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE
    capability = _ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Gpu(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=_ask(nvml.nvmlDeviceGetUUID, handle),
        memory_mib=_nvml_memory_mib(nvml, handle),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver_version=_ask(nvml.nvmlSystemGetDriverVersion),
        mig_enabled=mig_enabled,
        slices=tuple(_slices(nvml, handle)) if mig_enabled else (),
    )


def _slices(nvml: Any, handle: Any) -> Iterable[MigSlice]:
    for position in range(_ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        piece = _ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, position)
        memory_mib = None if piece is None else _nvml_memory_mib(nvml, piece)
        uuid = None if piece is None else _ask(nvml.nvmlDeviceGetUUID, piece)
        if memory_mib is not None and uuid is not None:
            yield MigSlice(uuid, _ask(nvml.nvmlDeviceGetName, piece) or "slice", memory_mib)


def _nvml_memory_mib(nvml: Any, handle: Any) -> float | None:
    newer = _ask(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    if newer is not None:
        return (newer.total - newer.reserved) / 2**20
    older = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    return None if older is None else older.total / 2**20


def _ask(question: Any, *arguments: Any) -> Any:
    """Call NVML; None where this driver or this part has no answer."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


def _facts(host: Host, answer: Answer, setting: str | None, visible: Visible) -> dict[str, Fact]:
    sysfs = host.read("/sys/module/nvidia/version")
    driver = sysfs or next((gpu.driver_version for gpu in answer.gpus if gpu.driver_version), None)
    errors = "; ".join(answer.errors) or None
    physical = [f"{gpu.index}: {gpu.name}" for gpu in answer.gpus]
    if sysfs and not answer.gpus:
        errors = f"the driver {sysfs} is loaded, but no GPU answered; {errors}"
    facts = {
        "cuda.driver": Fact(driver, "/sys/module/nvidia/version" if sysfs else answer.source),
        "cuda.physical": Fact(physical, answer.source, errors),
        "cuda.visible": Fact(
            [f"{device.index}: {device.name}" for device in visible.devices],
            "all" if setting is None else f"CUDA_VISIBLE_DEVICES={setting}",
            "; ".join(visible.notes) or None,
        ),
    }
    if len({gpu.name for gpu in answer.gpus}) > 1 and host.env.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        facts["cuda.order"] = Fact(
            None, "CUDA_DEVICE_ORDER", "GPUs differ and CUDA counts the fastest first; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    return facts
