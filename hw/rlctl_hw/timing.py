"""Seconds per phase of one step by roofline: the larger of computing and reading, and what must be sent.

A roofline is the best a machine could do. Published steps of several trainers took up to 3 times as long (waiting,
moving weights in and out, uneven batches), so each phase carries that range until this machine was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil

from rlctl_hw.generation_time import generation
from rlctl_hw.lengths import lengths
from rlctl_hw.needs import DTYPE_BYTES, FORWARD_ONLY, MASTER_BYTES, MOMENT_BYTES
from rlctl_hw.speeds import GB, Speeds, catalogue_entry, speeds_of
from rlctl_hw.training_memory import trained_params, weight_bytes
from rlctl_hw.training_time import Work, training_seconds
from rlctl_hw.types import Hardware, Layout, PhaseTime, Plan, Workload

SLOWEST, FASTEST = 3.0, 1.0
"""Of the roofline. Published steps took up to 3 times a bare one; docs/step_times.md has those that can be mapped."""
EXPECTED = (SLOWEST * FASTEST) ** 0.5
"""The middle of the range, in ratios."""
MEASURED_RANGE = 1.25
"""What a machine measured once may be off, either way."""
STORE_GB_PER_S = 1.0
"""Through Ray's object store: a copy to the host, packing, a copy out, in one process."""
DISK_GB_PER_S = 1.0
"""Of one node's checkpoint disk."""
STEP_PASSES = 5
"""Times the optimizer reads or writes each of a parameter's numbers."""


def catalogue_key(hardware: Hardware) -> str | None:
    """Return the devices' key in the catalogue, None where one is not in it."""
    entry = catalogue_entry(hardware)
    return None if entry is None else entry.key


def predict(workload: Workload, hardware: Hardware, layout: Layout) -> tuple[PhaseTime, ...]:
    """Return the phases of one step with their times; nothing where the device's speed is not known."""
    speeds = speeds_of(hardware)
    if speeds is None:
        return ()
    rows = [
        *_generation(workload, layout, speeds),
        *_passes(workload, hardware, layout, speeds),
        ("weight_sync", *_sync(workload, hardware, layout, speeds), True),
        ("checkpoint", _checkpoint_s(workload, hardware, layout), f"disk at {DISK_GB_PER_S:g} GB/s a node", False),
    ]
    return tuple(_ranged(*row, hardware.corrections.time_factors) for row in rows)


def step_seconds(plan: Plan) -> tuple[float, float, float] | None:
    """Return the expected time of a step, the least and the most; None where no time is predicted."""
    times = [time for time in plan.times if time.per_step]
    if not times:
        return None
    return sum(t.seconds for t in times), sum(t.low_s for t in times), sum(t.high_s for t in times)


def _ranged(phase: str, least_s: float, why: str, per_step: bool, factors: Mapping[str, float]) -> PhaseTime:
    if phase not in factors:
        likely, low, high = least_s * EXPECTED, least_s * FASTEST, least_s * SLOWEST
        return PhaseTime(phase, likely, low, high, why, least_s, "assumed", per_step)
    likely = least_s * factors[phase]
    low, high = likely / MEASURED_RANGE, likely * MEASURED_RANGE
    return PhaseTime(phase, likely, low, high, why, least_s, "measured", per_step)


Row = tuple[str, float, str, bool]


def _generation(workload: Workload, layout: Layout, speeds: Speeds) -> list[Row]:
    if not workload.rollout_needed:
        return []
    seconds, why = generation(workload, layout, speeds)
    if workload.greedy_responses:
        more, _ = generation(replace(workload, group_size=workload.greedy_responses), layout, speeds)
        seconds, why = seconds + more, f"{why}, and greedy responses by themselves"
    if workload.max_rounds > 1:
        why = f"{why}; of one round, where a step may take {workload.max_rounds}"
    return [("generation", seconds, why, True)]


def _passes(workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds) -> list[Row]:
    """Return what the trainer does: forward passes of each role, then the updates."""
    step = lengths(workload)
    shared = workload.prompts_per_step if workload.engine == "fsdp2" else step.num
    tokens = step.num * step.mean + shared * step.prompt
    work = Work(tokens=tokens, squares=step.num * step.square)
    rows: list[Row] = []

    def forward(phase: str, role: str, what: str) -> None:
        seconds, why = training_seconds(work, role, False, workload, hardware, layout, speeds)
        moved = _param_move_s(role, workload, layout, speeds)
        rows.append((phase, seconds + moved, f"{what}: {why}", True))

    if workload.old_logprobs_needed:
        forward("logprobs", "actor", "policy")
    if workload.reference_needed:
        role = "reference" if "reference" in workload.roles else "actor"
        forward("reference_logprobs", role, "reference")
    if "teacher" in workload.roles:
        forward("teacher_logprobs", "teacher", "teacher")
    if "critic" in workload.roles:
        forward("values", "critic", "critic")
    if "reward_model" in workload.roles:
        forward("reward_model_logprobs", "reward_model", "reward model")
    for role in ("actor", "critic", "reward_model"):
        if role in workload.roles:
            rows.append((f"{role}_update", *_update(work, role, workload, hardware, layout, speeds), True))
    return rows


def _update(
    work: Work, role: str, workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds
) -> tuple[float, str]:
    seconds, why = training_seconds(work, role, True, workload, hardware, layout, speeds)
    if role == "actor" and workload.reads_ahead:
        seconds += training_seconds(work, role, False, workload, hardware, layout, speeds)[0]
        why = f"{why}, a pass before each"
    steps = workload.mini_batches * workload.epochs
    shard = trained_params(workload, role) / layout.trainer_devices
    stepping = STEP_PASSES * shard * (MASTER_BYTES + MOMENT_BYTES) / speeds.bandwidth
    if layout.savings.offload_optimizer and workload.engine == "fsdp2":
        stepping += 2 * shard * MOMENT_BYTES / speeds.host_bus
    # The host takes the step of what it keeps: gradients and weights cross the bus, and its memory is slower.
    stepping += layout.savings.host_optimizer_share * shard * 4 * MOMENT_BYTES / speeds.host_bus
    moved = _param_move_s(role, workload, layout, speeds)
    return workload.epochs * seconds + steps * stepping + moved, f"{why}, {steps} optimizer steps"


def _param_move_s(role: str, workload: Workload, layout: Layout, speeds: Speeds) -> float:
    """Return the time to bring a role's parameters from the host and to take them back."""
    if not layout.savings.offload_params:
        return 0.0
    return 2 * weight_bytes(role, workload, layout) / layout.trainer_devices / speeds.host_bus


def _sync(workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds) -> tuple[float, str]:
    if not workload.rollout_needed:
        return 0.0, "no rollout engine"
    size = workload.shape.num_params * DTYPE_BYTES[layout.rollout_dtype]
    moved = _param_move_s("actor", workload, layout, speeds)
    if workload.engine == "fsdp2":
        return size / (STORE_GB_PER_S * GB) + moved, f"Ray's object store at {STORE_GB_PER_S:g} GB/s"
    one_node = layout.trainer_devices + layout.rollout_devices <= len(hardware.devices)
    one_node = one_node or hardware.num_nodes == 1
    rate = speeds.island_link if one_node else speeds.node_link
    # Ranks of one stage send their parts side by side to the engines' ranks.
    return size / (rate * layout.mesh.pp * layout.mesh.tp) + moved, f"collectives at {rate / GB:.0f} GB/s a sender"


def _checkpoint_s(workload: Workload, hardware: Hardware, layout: Layout) -> float:
    masters = MASTER_BYTES if workload.engine == "megatron" else 0
    states = sum(
        weight_bytes(role, workload, layout) + trained_params(workload, role) * (MOMENT_BYTES + masters)
        for role in workload.roles
        if role not in FORWARD_ONLY
    )
    nodes = ceil(layout.trainer_devices / len(hardware.devices))
    return states / (nodes * DISK_GB_PER_S * GB)
