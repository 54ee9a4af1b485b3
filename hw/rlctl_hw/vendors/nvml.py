"""NVIDIA's library: GPUs, MIG slices and links in one answer of plain JSON, which a record can keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import byref
from dataclasses import asdict
from itertools import combinations
from typing import Any
from uuid import UUID

import pynvml

from rlctl_hw.host import Host
from rlctl_hw.plain import read_plain
from rlctl_hw.topology import is_complete
from rlctl_hw.types import Link
from rlctl_hw.vendors.nvidia_smi import Answer, Fabric, Gpu, MigSlice, parse_bus_id

SOURCE = "NVML"
MIB = 2**20
WAYS = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "PIX",
    pynvml.NVML_TOPOLOGY_SINGLE: "PIX",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
    pynvml.NVML_TOPOLOGY_NODE: "NODE",
    pynvml.NVML_TOPOLOGY_SYSTEM: "SYS",
}
"""The library's words for the way over PCIe, as `nvidia-smi topo -m` prints them."""
FABRIC_STATES = {
    pynvml.NVML_GPU_FABRIC_STATE_NOT_STARTED: "Not Started",
    pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS: "In Progress",
    pynvml.NVML_GPU_FABRIC_STATE_COMPLETED: "Completed",
}
MAX_LINKS = 18
"""NVLinks of one GPU, at most, up to Blackwell."""


def read(host: Host, nvml: Any = pynvml) -> Answer:
    """Return what the library says of this machine; never raises."""
    try:
        return read_plain(Answer, host.answer("nvml", lambda: asdict(ask(nvml))))
    except ValueError as error:
        return Answer((), SOURCE, (f"NVML: no answer that can be read: {error}",))


def ask(nvml: Any = pynvml) -> Answer:
    """Ask the driver's library; a GPU that does not answer is left out and named in the errors."""
    try:
        nvml.nvmlInit()
    except (pynvml.NVMLError, OSError) as error:
        return Answer((), SOURCE, (f"NVML: {error}",))
    try:
        return _gather(nvml)
    except pynvml.NVMLError as error:
        return Answer((), SOURCE, (f"NVML: {error}",))
    finally:
        nvml.nvmlShutdown()


def _gather(nvml: Any) -> Answer:
    gpus, handles, errors = [], {}, []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append(_gpu(nvml, index, handle))
            handles[index] = handle
        except pynvml.NVMLError as error:
            errors.append(f"NVML, GPU {index}: {error}")
    links = tuple(_links(nvml, handles))
    cuda = _try(nvml.nvmlSystemGetCudaDriverVersion)
    return Answer(
        tuple(gpus),
        SOURCE,
        tuple(errors),
        # Half a picture would make islands that are not there.
        links if is_complete(len(gpus), links) else (),
        None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
    )


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    mig = _try(nvml.nvmlDeviceGetMigMode, handle)
    mig_enabled = mig is not None and mig[0] == nvml.NVML_DEVICE_MIG_ENABLE
    capability = _try(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    total_mib, used_mib = _memory_mib(nvml, handle)
    bus = _try(nvml.nvmlDeviceGetPciInfo, handle)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(_try(nvml.nvmlDeviceGetUUID, handle)) or None,
        memory_mib=total_mib,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver_version=_text(_try(nvml.nvmlSystemGetDriverVersion)) or None,
        mig_enabled=mig_enabled,
        slices=tuple(_slices(nvml, handle)) if mig_enabled else (),
        used_mib=used_mib,
        pci=None if bus is None else parse_bus_id(_text(bus.busId)),
        fabric=_fabric(nvml, handle),
    )


def _memory_mib(nvml: Any, handle: Any) -> tuple[float | None, float | None]:
    """Return what processes can take, and what they have taken."""
    newer = _try(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    if newer is not None:
        return (newer.total - newer.reserved) / MIB, newer.used / MIB
    older = _try(nvml.nvmlDeviceGetMemoryInfo, handle)
    return (None, None) if older is None else (older.total / MIB, older.used / MIB)


def _slices(nvml: Any, handle: Any) -> Iterator[MigSlice]:
    for position in range(_try(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        piece = _try(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, position)
        if piece is None:
            continue
        memory_mib, _ = _memory_mib(nvml, piece)
        uuid, name = _text(_try(nvml.nvmlDeviceGetUUID, piece)), _text(_try(nvml.nvmlDeviceGetName, piece))
        if memory_mib is not None and uuid:
            # The name is the GPU's with the profile behind it: `NVIDIA H100 80GB HBM3 MIG 1g.10gb`.
            yield MigSlice(uuid, name.rpartition("MIG ")[2] or "slice", memory_mib)


def _fabric(nvml: Any, handle: Any) -> Fabric | None:
    info = nvml.c_nvmlGpuFabricInfo_t()
    if _try(nvml.nvmlDeviceGetGpuFabricInfo, handle, byref(info)) is None or info.state not in FABRIC_STATES:
        return None
    cluster = bytes(info.clusterUuid)
    return Fabric(FABRIC_STATES[info.state], info.cliqueId, str(UUID(bytes=cluster)) if any(cluster) else None)


def _links(nvml: Any, handles: dict[int, Any]) -> Iterator[Link]:
    wires = {index: tuple(_wires(nvml, handle)) for index, handle in handles.items()} if len(handles) > 1 else {}
    for first, second in combinations(handles, 2):
        pair = (handles[first], handles[second])
        if _try(nvml.nvmlDeviceGetP2PStatus, *pair, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            yield Link(first, second, f"NV{_num_wires(nvml, wires[first], handles[second])}")
        elif (way := WAYS.get(_try(nvml.nvmlDeviceGetTopologyCommonAncestor, *pair))) is not None:
            yield Link(first, second, way)


def _wires(nvml: Any, handle: Any) -> Iterator[Any]:
    """Yield where each NVLink of a GPU that is up ends: the bus place of a GPU or of a switch."""
    for number in range(MAX_LINKS):
        if _try(nvml.nvmlDeviceGetNvLinkState, handle, number) == nvml.NVML_FEATURE_ENABLED:
            yield _bus_place(_try(nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, number))


def _num_wires(nvml: Any, wires: Iterable[Any], other: Any) -> int:
    ends = tuple(wires)
    direct = ends.count(_bus_place(_try(nvml.nvmlDeviceGetPciInfo, other)))
    # Through switches every wire serves every pair.
    return max(1, direct or len(ends))


def _bus_place(bus: Any) -> tuple[int, int, int] | None:
    return None if bus is None else (bus.domain, bus.bus, bus.device)


def _text(answer: str | bytes | None) -> str:
    # Older bindings give bytes.
    return answer.decode("utf-8", errors="replace") if isinstance(answer, bytes) else answer or ""


def _try(question: Any, *arguments: Any) -> Any:
    """Call NVML; None where this driver or this part has no answer."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None
