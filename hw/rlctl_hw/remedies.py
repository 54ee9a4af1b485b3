"""The nearest settings that would fit: each is tried on the planner itself before it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rlctl_hw.devices import catalogue
from rlctl_hw.probe import parse_hardware
from rlctl_hw.search import fits
from rlctl_hw.types import Device, DeviceKind, Hardware, Pins, Workload

PIN_KEYS = {
    "compute_dtype": "engine.compute_dtype",
    "rollout_dtype": "rollout.dtype",
    "trainer_devices": "trainer.num_devices",
    "rollout_devices": "rollout.num_devices",
    "max_tokens_per_micro_batch": "engine.max_tokens_per_micro_batch",
    "max_concurrent": "rollout.max_concurrent",
    "gpu_memory_share": "rollout.gpu_memory_share",
    "object_store_gib": "ray.object_store_gib",
    "recompute": "engine.recompute",
    "offload_params": "engine.offload_params",
    "offload_optimizer": "engine.offload_optimizer",
    "reshard_after_forward": "engine.reshard_after_forward",
    "host_optimizer_share": "engine.host_optimizer_share",
    "rollout_tensor_parallel": "rollout.tensor_parallel",
    "tensor_parallel": "engine.tensor_parallel",
    "pipeline_parallel": "engine.pipeline_parallel",
    "context_parallel": "engine.context_parallel",
    "expert_parallel": "engine.expert_parallel",
    "sequence_parallel": "engine.sequence_parallel",
}
MOST_REMEDIES, MOST_NODES = 4, 64
SMALL_CHUNK_TOKENS = 256
LORA_RANK = 32
USUAL_MACHINES: dict[DeviceKind, str] = {"cuda": "h100-80gb:8", "rocm": "mi300x-192gb:8", "ascend": "910b3-64gb:8"}
HOST_SIZES_GIB = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Remedy:
    """A change that makes a workload fit: in words, as settings of a run (None unsets), and as it is planned."""

    text: str
    workload: Workload
    hardware: Hardware
    settings: dict[str, Any] = field(default_factory=dict)
    """Empty where the change is another machine."""


def remedies_for(workload: Workload, hardware: Hardware) -> tuple[str, ...]:
    """Return up to four changes in words, the smallest first, each of which alone makes the workload fit."""
    return tuple(remedy.text for remedy in remedies(workload, hardware)) or ("use a smaller model",)


def remedies(workload: Workload, hardware: Hardware) -> tuple[Remedy, ...]:
    """Return up to four changes, the smallest first, each of which alone makes the workload fit."""
    working: list[Remedy] = []
    for source in (_changes, _all_pins, _shorter, _adapters, _more_nodes, _larger, _cluster):
        for remedy in source(workload, hardware):
            if len(working) < MOST_REMEDIES and fits(remedy.workload, remedy.hardware):
                working.append(remedy)
    return tuple(working)


def pin_key(name: str, workload: Workload) -> str:
    """Return a pin's key in the configuration."""
    if name == "recompute" and workload.engine == "fsdp2":
        return "engine.gradient_checkpointing"
    return PIN_KEYS[name]


def _changes(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    for name in _pinned(workload):
        key = pin_key(name, workload)
        changed = replace(workload, pins=replace(workload.pins, **{name: None}))
        yield Remedy(f"unset {key}", changed, hardware, {key: None})
    if workload.copied_roles:
        key = "checkpoint.asynchronous"
        yield Remedy(f"set {key}=false", replace(workload, copied_roles=()), hardware, {key: False})
    if workload.engine == "fsdp2" and workload.logits_chunk_tokens > SMALL_CHUNK_TOKENS:
        key = "engine.logits_chunk_tokens"
        changed = replace(workload, logits_chunk_tokens=SMALL_CHUNK_TOKENS)
        yield Remedy(f"set {key}={SMALL_CHUNK_TOKENS}", changed, hardware, {key: SMALL_CHUNK_TOKENS})


def _all_pins(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    """Yield the run with nothing pinned, where more than one thing is."""
    names = _pinned(workload)
    if len(names) > 1:
        keys = [pin_key(name, workload) for name in names]
        changed = replace(workload, pins=replace(workload.pins, **dict.fromkeys(names)))
        yield Remedy(f"unset {', '.join(keys)}", changed, hardware, dict.fromkeys(keys))


def _pinned(workload: Workload) -> list[str]:
    return [f.name for f in fields(Pins) if f.name in PIN_KEYS and getattr(workload.pins, f.name) is not None]


def _shorter(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    """Yield the longest response that fits, found by halving."""
    low, high = 0, workload.max_response_tokens - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(workload, max_response_tokens=middle), hardware):
            low = middle
        else:
            high = middle - 1
    if low > 0:
        key = "rollout.max_response_tokens"
        yield Remedy(f"set {key}={low} or lower", replace(workload, max_response_tokens=low), hardware, {key: low})


def _adapters(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    """Yield training adapters in place of all weights, whose frozen rest also serves as the reference."""
    if workload.lora_rank or workload.engine != "fsdp2":
        return
    changed = replace(
        workload,
        lora_rank=LORA_RANK,
        has_reference=workload.reference_needed,
        roles=tuple(role for role in workload.roles if role != "reference"),
    )
    yield Remedy(
        f"set model.lora.rank={LORA_RANK}, which trains adapters only",
        changed,
        hardware,
        {"model.lora.rank": LORA_RANK},
    )


def _more_nodes(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    num_nodes = 2 * hardware.num_nodes
    while hardware.kind != "cpu" and num_nodes <= MOST_NODES:
        larger = replace(hardware, num_nodes=num_nodes)
        if fits(workload, larger):
            count = num_nodes * len(hardware.devices)
            words = f"use {count} such devices ({num_nodes} nodes of {len(hardware.devices)})"
            yield Remedy(words, workload, larger)
            return
        num_nodes *= 2


def _larger(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    """Yield the smallest catalogued device, or host, that would do in place of each one here."""
    if hardware.kind == "cpu":
        for size in (size for size in HOST_SIZES_GIB if size > hardware.host_memory_gib):
            larger = _with_memory(hardware, size)
            if fits(workload, larger):
                yield Remedy(f"use a host with {size} GiB of memory", workload, larger)
                return
        return
    smallest = min(device.memory_gib for device in hardware.devices)
    rows = (entry for entry in catalogue() if entry.kind == hardware.kind and entry.memory_gib > smallest)
    for entry in sorted(rows, key=lambda entry: entry.memory_gib):
        devices = tuple(
            Device(
                entry.kind, i, entry.names[0], entry.memory_gib,
                compute_capability=entry.compute_capability, catalogue=entry.key,
            )
            for i in range(len(hardware.devices))
        )  # fmt: skip
        memory_gib = max(hardware.host_memory_gib, 2 * len(devices) * entry.memory_gib)
        larger = replace(hardware, devices=devices, host_memory_gib=memory_gib)
        if fits(workload, larger):
            yield Remedy(f"use {len(devices)} x {entry.key}", workload, larger)
            return


def _cluster(workload: Workload, hardware: Hardware) -> Iterator[Remedy]:
    """Yield the smallest cluster of the vendor's usual training machine that would do."""
    if hardware.kind == "cpu":
        return
    num_nodes = 1
    while num_nodes <= MOST_NODES:
        spec = f"{USUAL_MACHINES[hardware.kind]}x{num_nodes}"
        larger = parse_hardware(spec)
        if fits(workload, larger):
            yield Remedy(f"use {spec} (devices per node x nodes)", workload, larger)
            return
        num_nodes *= 2


def _with_memory(hardware: Hardware, gib: float) -> Hardware:
    devices = tuple(replace(device, memory_gib=gib) for device in hardware.devices)
    return replace(hardware, devices=devices, host_memory_gib=gib)
