"""The nearest settings that would fit: each is tried on the planner itself before it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from rlctl_hw.devices import catalogue
from rlctl_hw.types import Device, Hardware, Pins, Workload

Fits = Callable[[Workload, Hardware], bool]

PIN_KEYS = {
    "compute_dtype": "engine.compute_dtype",
    "rollout_dtype": "rollout.dtype",
    "trainer_devices": "trainer.num_devices",
    "rollout_devices": "rollout.num_devices",
    "max_tokens_per_micro_batch": "engine.max_tokens_per_micro_batch",
    "max_concurrent": "rollout.max_concurrent",
    "gpu_memory_share": "rollout.gpu_memory_share",
    "object_store_gib": "ray.object_store_gib",
}
MOST_REMEDIES, MOST_NODES = 4, 64
SMALL_CHUNK_TOKENS = 256
HOST_SIZES_GIB = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def remedies_for(workload: Workload, hardware: Hardware, fits: Fits) -> tuple[str, ...]:
    """Return up to four changes, the smallest first, each of which alone makes the workload fit."""
    working = [text for text, changed in _changes(workload) if fits(changed, hardware)]
    working += _shorter(workload, hardware, fits)
    if len(working) < MOST_REMEDIES:
        working += _more_nodes(workload, hardware, fits) + _larger(workload, hardware, fits)
    return tuple(working[:MOST_REMEDIES]) or ("use a smaller model",)


def _changes(workload: Workload) -> Iterator[tuple[str, Workload]]:
    for field in fields(Pins):
        if field.name in PIN_KEYS and getattr(workload.pins, field.name) is not None:
            key = PIN_KEYS[field.name]
            yield f"unset {key}", replace(workload, pins=replace(workload.pins, **{field.name: None}))
    switches = [
        name
        for name in ("gradient_checkpointing", "offload_optimizer", "offload_params")
        if not getattr(workload, name)
    ]
    for name in switches:
        yield f"set engine.{name}=true", replace(workload, **{name: True})
    if len(switches) > 1:
        everything = ", ".join(f"engine.{name}=true" for name in switches)
        yield f"set {everything}", replace(workload, **dict.fromkeys(switches, True))
    if workload.logits_chunk_tokens > SMALL_CHUNK_TOKENS:
        yield (
            f"set engine.logits_chunk_tokens={SMALL_CHUNK_TOKENS}",
            replace(workload, logits_chunk_tokens=SMALL_CHUNK_TOKENS),
        )


def _shorter(workload: Workload, hardware: Hardware, fits: Fits) -> list[str]:
    """Return the longest response that fits, in steps of halving and back."""
    low, high = 0, workload.max_response_tokens - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(workload, max_response_tokens=middle), hardware):
            low = middle
        else:
            high = middle - 1
    return [f"set rollout.max_response_tokens={low} or lower"] if low > 0 else []


def _more_nodes(workload: Workload, hardware: Hardware, fits: Fits) -> list[str]:
    if hardware.kind == "cpu":
        return []
    num_nodes = 2 * hardware.num_nodes
    while num_nodes <= MOST_NODES:
        if fits(workload, replace(hardware, num_nodes=num_nodes)):
            return [
                f"use {num_nodes * len(hardware.devices)} such devices ({num_nodes} nodes of {len(hardware.devices)})"
            ]
        num_nodes *= 2
    return []


def _larger(workload: Workload, hardware: Hardware, fits: Fits) -> list[str]:
    """Return the smallest catalogued device, or host, that would do in place of each one here."""
    if hardware.kind == "cpu":
        sizes = [size for size in HOST_SIZES_GIB if size > hardware.host_memory_gib]
        enough = next((size for size in sizes if fits(workload, _with_memory(hardware, size))), None)
        return [f"use a host with {enough} GiB of memory"] if enough else []
    rows = sorted((entry for entry in catalogue() if entry.kind == hardware.kind), key=lambda entry: entry.memory_gib)
    for entry in rows:
        device = Device(entry.kind, 0, entry.names[0], entry.memory_gib, None, entry.compute_capability)
        devices = tuple(replace(device, index=i) for i in range(len(hardware.devices)))
        memory_gib = max(hardware.host_memory_gib, 2 * len(devices) * entry.memory_gib)
        if fits(workload, replace(hardware, devices=devices, host_memory_gib=memory_gib)):
            return [f"use {len(devices)} x {entry.key}"]
    return []


def _with_memory(hardware: Hardware, gib: float) -> Hardware:
    devices = tuple(replace(device, memory_gib=gib) for device in hardware.devices)
    return replace(hardware, devices=devices, host_memory_gib=gib)
