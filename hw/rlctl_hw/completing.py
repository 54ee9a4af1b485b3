"""One candidate layout made into a whole plan: precisions, budgets, memory and time, or the reason it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlctl_hw import budgets, placing, timing
from rlctl_hw.budgets import LIMIT_SHARE, TARGET_SHARE
from rlctl_hw.host_memory import host_memory
from rlctl_hw.layouts import Candidate
from rlctl_hw.memory import bands, memory, peak_gib
from rlctl_hw.needs import PHASES
from rlctl_hw.speeds import peak_tflops
from rlctl_hw.training_time import pass_flops
from rlctl_hw.types import (
    Choice,
    DoesNotFit,
    Hardware,
    Layout,
    MemoryPart,
    PhaseBand,
    Plan,
    Workload,
)

HOST_LIMIT_SHARE = 0.9


def complete(workload: Workload, hardware: Hardware, candidate: Candidate) -> Plan:
    """Return the plan of one candidate, or raise DoesNotFit with numbers."""
    choices: list[Choice] = []
    least = _least_layout(workload, hardware, candidate, choices)
    _check_device(bands(workload, least), workload, least)
    layout = _chosen_layout(workload, least, choices)
    parts, ranges = memory(workload, layout), bands(workload, layout)
    _check_device(ranges, workload, layout)
    pins = workload.pins
    store_gib = _settle(choices, pins.object_store_gib, lambda: budgets.object_store(workload, layout))
    on_host = host_memory(workload, hardware, layout, store_gib)
    _check_host(hardware, layout, parts, on_host, store_gib)
    threads = _settle(
        choices, pins.threads_per_worker, lambda: placing.threads_per_worker(workload, hardware, candidate)
    )
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
        placement=workload.placement,
        engine=workload.engine,
        mesh=layout.mesh,
        savings=layout.savings,
        rollout_tensor_parallel=layout.rollout_tensor_parallel,
        rollout_pipeline_parallel=layout.rollout_pipeline_parallel,
        device_memory_gib=layout.memory_gib,
        memory=parts,
        bands=ranges,
        host_memory=on_host,
        times=timing.predict(workload, hardware, layout),
        pass_flops=tuple(pass_flops(workload.shape_of(role), role) for role in workload.roles),
        peak_tflops=peak_tflops(hardware, layout.compute_dtype),
        choices=tuple(choices),
        notes=tuple(_notes(workload, hardware, layout, threads, store_gib, parts)),
    )


def _settle(choices: list[Choice], pin: Any, choose: Callable[[], Choice]) -> Any:
    """Return the pin, or make the choice and keep its reason."""
    if pin is not None:
        return pin
    choice = choose()
    choices.append(choice)
    return choice.value


def _least_layout(workload: Workload, hardware: Hardware, candidate: Candidate, choices: list[Choice]) -> Layout:
    """Return the layout with precisions settled and the least of everything else."""
    pins = workload.pins
    compute_dtype = _settle(choices, pins.compute_dtype, lambda: placing.compute_dtype(workload, hardware))
    rollout_dtype = _settle(
        choices,
        pins.rollout_dtype,
        lambda: Choice("rollout.dtype", compute_dtype, "follows engine.compute_dtype", "formula"),
    )
    placing.check_rollout_dtype(workload, hardware, rollout_dtype)
    return Layout(
        device=hardware.kind,
        memory_gib=min(device.memory_gib for device in hardware.devices),
        trainer_devices=candidate.trainer_devices,
        rollout_devices=candidate.rollout_devices,
        compute_dtype=compute_dtype,
        rollout_dtype=rollout_dtype,
        max_tokens_per_micro_batch=workload.longest_tokens,
        max_concurrent=1,
        gpu_memory_share=0.0,
        mesh=candidate.mesh,
        savings=candidate.savings,
        rollout_tensor_parallel=candidate.rollout.tensor,
        rollout_pipeline_parallel=candidate.rollout.pipeline,
        catalogue=timing.catalogue_key(hardware),
        overhead_factor=hardware.corrections.overhead_factor,
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


def _check_device(ranges: tuple[PhaseBand, ...], workload: Workload, layout: Layout) -> None:
    """Refuse a phase beyond the limit, or one whose range reaches beyond the device."""
    worst = max(ranges, key=lambda band: band.gib)
    over = worst.gib > LIMIT_SHARE * layout.memory_gib
    # On CPU the kernel's page cache gives way, so the range alone refuses nothing.
    doubtful = None if layout.device == "cpu" else max(ranges, key=lambda band: band.high_gib)
    if not over and (doubtful is None or doubtful.high_gib <= layout.memory_gib):
        return
    band = worst if over or doubtful is None else doubtful
    phase = PHASES[PHASES.index(band.phase)]
    largest = sorted(memory(workload, layout, (phase,)), key=lambda part: -part.gib)[:3]
    where = "this host" if layout.device == "cpu" else "a device"
    limit = f"{LIMIT_SHARE:.0%} usable" if over else f"borderline: it may reach {band.high_gib:.1f} GiB"
    raise DoesNotFit(
        f"{band.phase} needs {band.gib:.1f} GiB on {where} of {layout.memory_gib:.1f} GiB ({limit}); most is "
        + ", ".join(f"{part.part} {part.gib:.1f} GiB" for part in largest),
        (),
        short_gib=max(band.high_gib, worst.gib / LIMIT_SHARE) - layout.memory_gib,
        phase=band.phase,
        need_gib=band.gib,
    )


def _check_host(
    hardware: Hardware,
    layout: Layout,
    parts: tuple[MemoryPart, ...],
    on_host: tuple[MemoryPart, ...],
    store_gib: float,
) -> None:
    if layout.device == "cpu":
        need, usable = store_gib + peak_gib(parts)[1], hardware.host_memory_gib
    else:
        need, usable = peak_gib(on_host)[1], HOST_LIMIT_SHARE * hardware.host_memory_gib
    if need > usable:
        raise DoesNotFit(
            f"the host needs {need:.1f} GiB, {store_gib:.2f} of them Ray's object store (ray.object_store_gib), "
            f"but has {hardware.host_memory_gib:.1f} GiB",
            (),
        )


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
