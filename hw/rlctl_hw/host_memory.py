"""What a run on accelerators takes of a node's memory: loading, what is offloaded or copied, sleeping engines, Ray."""

from __future__ import annotations

from rlctl_hw.calculated import rest_needs
from rlctl_hw.needs import GIB, MOMENT_BYTES, RAY_GIB
from rlctl_hw.rollout_memory import rollout_weight_bytes
from rlctl_hw.training_memory import copied_bytes, distributions, trained_params, weight_bytes
from rlctl_hw.types import Hardware, Layout, MemoryPart, Workload

PROCESS_GIB = 2.0
"""Resident size of one worker process beside what it keeps for its device."""


def host_memory(workload: Workload, hardware: Hardware, layout: Layout, store_gib: float) -> tuple[MemoryPart, ...]:
    """Return the parts of `loading` and of `running` on the fullest node, in GiB; none on CPU.

    While loading, the first rank of each FSDP2 role reads the whole model; later each rank keeps what is offloaded.
    """
    if layout.device == "cpu":
        return ()
    per_node = len(hardware.devices)
    ranks = min(layout.trainer_devices, per_node)
    engines = min(layout.rollout_devices, per_node)
    processes = (len(workload.roles) * ranks + engines) * PROCESS_GIB
    loading = _loading_bytes(workload, layout, ranks) / GIB
    offloaded = ranks * sum(_offloaded_bytes(role, workload, layout) for role in workload.roles) / GIB
    # vLLM asleep keeps its weights in host memory.
    colocated_vllm = workload.placement == "colocated" and workload.rollout == "vllm"
    asleep = engines * rollout_weight_bytes(workload, layout) / GIB if colocated_vllm else 0.0
    compared = ranks * distributions("actor_update", workload, layout) / GIB
    copied = ranks * sum(copied_bytes(role, workload, layout) for role in workload.roles) / GIB
    parts = [
        MemoryPart("loading", "weights", loading, "formula"),
        MemoryPart("running", "offloaded", offloaded, "formula"),
        MemoryPart("running", "sleeping_engine", asleep, "formula"),
        MemoryPart("running", "distributions", compared, "formula"),
        MemoryPart("running", "checkpoint_copy", copied, "formula"),
    ]
    for phase in ("loading", "running"):
        parts.append(MemoryPart(phase, "object_store", store_gib, "assumed"))
        parts.append(MemoryPart(phase, "processes", processes + RAY_GIB, "assumed"))
    return tuple(part for part in parts if part.gib > 0)


def _loading_bytes(workload: Workload, layout: Layout, ranks: int) -> float:
    """Return what one node reads before it is on the devices: the whole model, or each Megatron rank's part."""
    if workload.engine == "fsdp2":
        return sum(weight_bytes(role, workload, layout) for role in workload.roles)
    return ranks * max(rest_needs(role, workload, layout)["weights"].bytes for role in workload.roles)


def _offloaded_bytes(role: str, workload: Workload, layout: Layout) -> float:
    """Return the weights and moments of a role that one rank keeps on the host."""
    savings, rest = layout.savings, rest_needs(role, workload, layout)
    kept = rest["weights"].bytes if savings.offload_params else 0.0
    if savings.offload_optimizer and "optimizer" in rest:
        kept += rest["optimizer"].bytes
    moments = trained_params(workload, role) * MOMENT_BYTES / layout.trainer_devices
    return kept + savings.host_optimizer_share * moments
