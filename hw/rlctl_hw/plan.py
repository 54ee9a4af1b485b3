"""The one place that derives numbers: `plan(workload, hardware)` is pure, keeps pins, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlctl_hw import budgets, placing
from rlctl_hw.budgets import LIMIT_SHARE, TARGET_SHARE
from rlctl_hw.memory import GIB, MASTER_BYTES, MOMENT_BYTES, memory, peak_gib, role_params, rollout_weight_bytes
from rlctl_hw.remedies import remedies_for
from rlctl_hw.types import Choice, DoesNotFit, Hardware, Layout, MemoryPart, Plan, Workload

HOST_LIMIT_SHARE = 0.9


def plan(workload: Workload, hardware: Hardware) -> Plan:
    """Return what follows from the workload on this hardware, or raise DoesNotFit with numbers and ways out."""
    try:
        return _plan(workload, hardware)
    except DoesNotFit as refusal:
        if refusal.remedies:
            raise
        raise DoesNotFit(refusal.what, remedies_for(workload, hardware, _fits)) from refusal


def _fits(workload: Workload, hardware: Hardware) -> bool:
    try:
        _plan(workload, hardware)
    except DoesNotFit:
        return False
    return True


def _plan(workload: Workload, hardware: Hardware) -> Plan:
    placing.check_model(workload, hardware)
    counts = placing.device_counts(workload, hardware)
    choices = _count_choices(workload, counts)
    layout = _chosen_layout(workload, _least_layout(workload, hardware, counts, choices), choices)
    parts = memory(workload, layout)
    _check_device(parts, layout)
    pins = workload.pins
    store_gib = _settle(choices, pins.object_store_gib, lambda: budgets.object_store(workload, layout))
    _check_host(workload, hardware, layout, store_gib)
    threads = _settle(choices, pins.threads_per_worker, lambda: placing.threads_per_worker(workload, hardware, counts))
    return Plan(
        device=hardware.kind,
        num_nodes=hardware.num_nodes,
        trainer_devices=layout.trainer_devices,
        rollout_devices=layout.rollout_devices,
        threads_per_worker=threads,
        compute_dtype=layout.compute_dtype,
        rollout_dtype=layout.rollout_dtype,
        max_tokens_per_micro_batch=layout.max_tokens_per_micro_batch,
        rollout_max_concurrent=layout.max_concurrent,
        rollout_gpu_memory_share=layout.gpu_memory_share,
        object_store_gib=store_gib,
        device_memory_gib=layout.memory_gib,
        memory=parts,
        choices=tuple(choices),
        notes=(*counts.notes, *_notes(workload, hardware, layout, threads, store_gib, parts)),
    )


def _settle(choices: list[Choice], pin: Any, choose: Callable[[], Choice]) -> Any:
    """Return the pin, or make the choice and keep its reason."""
    if pin is not None:
        return pin
    choice = choose()
    choices.append(choice)
    return choice.value


def _count_choices(workload: Workload, counts: placing.Counts) -> list[Choice]:
    sides = (
        ("trainer.num_devices", workload.pins.trainer_devices, counts.trainer),
        ("rollout.num_devices", workload.pins.rollout_devices, counts.rollout),
    )
    return [Choice(key, count, counts.reason, "assumed") for key, pin, count in sides if pin is None]


def _least_layout(workload: Workload, hardware: Hardware, counts: placing.Counts, choices: list[Choice]) -> Layout:
    """Return the layout with precisions settled and the least of everything else."""
    pins = workload.pins
    compute_dtype = _settle(choices, pins.compute_dtype, lambda: placing.compute_dtype(hardware))
    rollout_dtype = _settle(
        choices,
        pins.rollout_dtype,
        lambda: Choice("rollout.dtype", compute_dtype, "follows engine.compute_dtype", "formula"),
    )
    placing.check_rollout_dtype(workload, hardware, rollout_dtype)
    return Layout(
        device=hardware.kind,
        memory_gib=min(device.memory_gib for device in hardware.devices),
        trainer_devices=counts.trainer,
        rollout_devices=counts.rollout,
        compute_dtype=compute_dtype,
        rollout_dtype=rollout_dtype,
        max_tokens_per_micro_batch=workload.longest_tokens,
        max_concurrent=1,
        gpu_memory_share=0.0,
    )


def _chosen_layout(workload: Workload, least: Layout, choices: list[Choice]) -> Layout:
    pins = workload.pins
    if pins.max_tokens_per_micro_batch is not None and pins.max_tokens_per_micro_batch < workload.longest_tokens:
        raise DoesNotFit(
            f"engine.max_tokens_per_micro_batch={pins.max_tokens_per_micro_batch} cannot hold one sequence of "
            f"{workload.longest_tokens} tokens",
            (f"set engine.max_tokens_per_micro_batch={workload.longest_tokens} or more, or unset it",),
        )
    budgets.check_cpu_cache(workload, least)
    tokens = _settle(choices, pins.max_tokens_per_micro_batch, lambda: budgets.micro_batch(workload, least))
    count = _settle(choices, pins.max_concurrent, lambda: budgets.max_concurrent(workload, least))
    layout = replace(least, max_tokens_per_micro_batch=tokens, max_concurrent=count)
    if pins.gpu_memory_share is not None:
        layout = replace(layout, gpu_memory_share=pins.gpu_memory_share)
        budgets.check_pinned_share(workload, layout)
        return layout
    share = budgets.gpu_memory_share(workload, layout)
    if share is None:
        return layout
    choices.append(share)
    return replace(layout, gpu_memory_share=share.value)


def _check_device(parts: tuple[MemoryPart, ...], layout: Layout) -> None:
    limit_gib = LIMIT_SHARE * layout.memory_gib
    phase, peak = peak_gib(parts)
    if peak <= limit_gib:
        return
    largest = sorted((part for part in parts if part.phase == phase), key=lambda part: -part.gib)[:3]
    where = "this host" if layout.device == "cpu" else "a device"
    raise DoesNotFit(
        f"{phase} needs {peak:.1f} GiB on {where} of {layout.memory_gib:.1f} GiB ({LIMIT_SHARE:.0%} usable); most is "
        + ", ".join(f"{part.part} {part.gib:.1f} GiB" for part in largest),
        (),
    )


def _check_host(workload: Workload, hardware: Hardware, layout: Layout, store_gib: float) -> None:
    if layout.device == "cpu":
        need = store_gib + peak_gib(memory(workload, layout))[1]
    else:
        # The first rank of each role reads the whole model; later each rank keeps what is offloaded.
        loading = sum(role_params(workload.shape, role) for role in workload.roles) * MASTER_BYTES / GIB
        need = store_gib + max(loading, _offloaded_gib(workload, hardware, layout))
    usable = hardware.host_memory_gib * (1.0 if layout.device == "cpu" else HOST_LIMIT_SHARE)
    if need > usable:
        raise DoesNotFit(
            f"the host needs {need:.1f} GiB, {store_gib:.2f} of them Ray's object store (ray.object_store_gib), "
            f"but has {hardware.host_memory_gib:.1f} GiB",
            (),
        )


def _offloaded_gib(workload: Workload, hardware: Hardware, layout: Layout) -> float:
    """Return what one node keeps in host memory: parameters, moments, the weights of a sleeping rollout engine."""
    shards = {role: role_params(workload.shape, role) / layout.trainer_devices for role in workload.roles}
    params = sum(shards.values()) * MASTER_BYTES if workload.offload_params else 0.0
    moments = sum(shard for role, shard in shards.items() if role != "reference") * MOMENT_BYTES
    asleep = rollout_weight_bytes(workload, layout) if workload.placement == "colocated" else 0
    per_device = params + (moments if workload.offload_optimizer else 0.0) + asleep
    return per_device * min(layout.trainer_devices, len(hardware.devices)) / GIB


def _notes(
    workload: Workload,
    hardware: Hardware,
    layout: Layout,
    threads: int,
    store_gib: float,
    parts: tuple[MemoryPart, ...],
) -> list[str]:
    notes = []
    # vLLM takes its share whole: its phases are full by choice.
    phase, peak = peak_gib(part for part in parts if part.phase not in ("generation", "weight_sync"))
    if peak > TARGET_SHARE * layout.memory_gib:
        notes.append(f"tight: {phase} is predicted to take {peak:.1f} of {layout.memory_gib:.1f} GiB")
    if store_gib > hardware.shm_gib:
        notes.append(
            f"/dev/shm has {hardware.shm_gib:.2f} GiB, less than Ray's object store of {store_gib:.2f} GiB, which then "
            "goes to slower storage; a container takes --shm-size"
        )
    both = workload.placement == "split"
    busy = layout.trainer_devices + layout.rollout_devices if both else layout.trainer_devices
    if layout.device == "cpu" and threads * busy > max(hardware.cpu_cores, busy):
        notes.append(
            f"{busy} busy workers with {threads} threads each on {hardware.cpu_cores} cores slow each other down"
        )
    if len({device.name for device in hardware.devices}) > 1:
        notes.append("the devices differ; the plan is for the one with the least memory")
    lacking = next((device.name for device in hardware.devices if not placing.has_bf16(device)), None)
    if layout.device != "cpu" and layout.compute_dtype == "bfloat16" and lacking is not None:
        notes.append(f"engine.compute_dtype=bfloat16 is emulated, and slow, on {lacking}")
    if layout.device == "cpu":
        notes += [fact.error for key, fact in hardware.facts.items() if key.startswith("unsurveyed") and fact.error]
    return notes
