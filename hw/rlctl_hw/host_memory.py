"""What a run on accelerators takes of one node's own memory: loading, what is offloaded, sleeping engines, Ray."""

from __future__ import annotations

from rlctl_hw.needs import GIB, MOMENT_BYTES, RAY_GIB
from rlctl_hw.rollout_memory import rollout_weight_bytes
from rlctl_hw.training_memory import trained_params, weight_bytes
from rlctl_hw.types import Hardware, Layout, MemoryPart, Workload

PROCESS_GIB = 2.0
"""Resident size of one worker process beside what it keeps for its device."""


def host_memory(workload: Workload, hardware: Hardware, layout: Layout, store_gib: float) -> tuple[MemoryPart, ...]:
    """Return the parts of `loading` and of `running` on the fullest node, in GiB; none on CPU.

    While loading, the first rank of each role reads the whole model; later each rank keeps what is offloaded.
    """
    if layout.device == "cpu":
        return ()
    per_node = len(hardware.devices)
    ranks = min(layout.trainer_devices, per_node)
    engines = min(layout.rollout_devices, per_node)
    processes = (len(workload.roles) * ranks + engines) * PROCESS_GIB
    loading = sum(weight_bytes(role, workload, layout) for role in workload.roles) / GIB
    offloaded = ranks * _offloaded_bytes(workload, layout) / GIB
    # vLLM asleep keeps its weights in host memory.
    colocated_vllm = workload.placement == "colocated" and workload.rollout == "vllm"
    asleep = engines * rollout_weight_bytes(workload, layout) / GIB if colocated_vllm else 0.0
    parts = [
        MemoryPart("loading", "weights", loading, "formula"),
        MemoryPart("running", "offloaded", offloaded, "formula"),
        MemoryPart("running", "sleeping_engine", asleep, "formula"),
    ]
    for phase in ("loading", "running"):
        parts.append(MemoryPart(phase, "object_store", store_gib, "assumed"))
        parts.append(MemoryPart(phase, "processes", processes + RAY_GIB, "assumed"))
    return tuple(part for part in parts if part.gib > 0)


def _offloaded_bytes(workload: Workload, layout: Layout) -> float:
    """Return the parameters and moments that one rank keeps on the host."""
    savings, ranks = layout.savings, layout.trainer_devices
    params = sum(weight_bytes(role, workload, layout) for role in workload.roles) if savings.offload_params else 0.0
    moments = sum(trained_params(workload, role) for role in workload.roles) * MOMENT_BYTES
    share = 1.0 if savings.offload_optimizer else savings.host_optimizer_share
    return (params + share * moments) / ranks
