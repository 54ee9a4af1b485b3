"""Bytes per device by phase and part: what trainer roles and rollout engines hold together on the fullest device.

Every role (actor, critic, reference, rollout) is a process of its own on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rlctl_hw.needs import GIB, PARTS, PHASES, RAY_GIB, Need, Phase, total
from rlctl_hw.rollout_memory import rollout_needs
from rlctl_hw.training_memory import trainer_needs
from rlctl_hw.types import Layout, MemoryPart, Origin, PhaseBand, Workload

CRITIC_PHASES = ("values", "critic_update")
OVERHEADS = ("overhead", "context", "communication")
"""Parts that processes hold whatever the model: what a measurement of this machine corrects."""
WEAKEST_FIRST: tuple[Origin, ...] = ("assumed", "interpolated", "formula", "measured")
ROLLOUT_PHASES = ("generation", "logprobs", "weight_sync")
"""Phases that supervised training does without."""
DEVICE_PHASES = ("load", "checkpoint")
"""Phases told apart on accelerators only: on CPU the processes' other work takes more."""


def phases_of(workload: Workload, layout: Layout) -> tuple[Phase, ...]:
    """Return the phases that this run goes through, in order."""
    absent: tuple[str, ...] = () if "critic" in workload.roles else CRITIC_PHASES
    if layout.device == "cpu":
        absent += (*DEVICE_PHASES, "values")
    if not workload.rollout_needed:
        absent += ROLLOUT_PHASES
    return tuple(phase for phase in PHASES if phase not in absent)


def memory(workload: Workload, layout: Layout, phases: Iterable[Phase] | None = None) -> tuple[MemoryPart, ...]:
    """Return what the fullest device holds, phase by phase (all, or those named); parts that are zero are left out."""
    return tuple(
        MemoryPart(phase, part, total(same) / GIB, _weakest(same))
        for phase in (phases_of(workload, layout) if phases is None else phases)
        for needs in [_on_device(phase, workload, layout)]
        for part in PARTS
        if (same := [need for need in needs if need.part == part and need.bytes > 0])
    )


def bands(workload: Workload, layout: Layout) -> tuple[PhaseBand, ...]:
    """Return each phase's total with the range in which it is expected, in GiB: parts may all be off the same way."""
    found = []
    for phase in phases_of(workload, layout):
        needs = _on_device(phase, workload, layout)
        gib, off = total(needs) / GIB, sum(need.off for need in needs) / GIB
        found.append(PhaseBand(phase, gib, gib - off, gib + off))
    return tuple(found)


def phase_gib(phase: Phase, workload: Workload, layout: Layout) -> float:
    """Return the sum of a phase's parts, in GiB."""
    return total(_on_device(phase, workload, layout)) / GIB


def peak_gib(parts: Iterable[MemoryPart]) -> tuple[str, float]:
    """Return the phase that takes most, and how much, in GiB."""
    totals: dict[str, float] = {}
    for part in parts:
        totals[part.phase] = totals.get(part.phase, 0.0) + part.gib
    phase = max(totals, key=lambda name: totals[name])
    return phase, totals[phase]


def _on_device(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    factor = layout.overhead_factor
    needs = _together(phase, workload, layout)
    return needs if factor is None else [_measured(need, factor) if need.part in OVERHEADS else need for need in needs]


def _measured(need: Need, factor: float) -> Need:
    return replace(need.times(factor), origin="measured")


def _together(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """Return what every process on the fullest device needs."""
    trainer = trainer_needs(phase, workload, layout)
    rollout = rollout_needs(phase, workload, layout) if workload.rollout_needed else []
    if layout.device == "cpu":
        # One memory for all processes of the host, whichever cores they have.
        everyone = [need.times(layout.trainer_devices) for need in trainer]
        everyone += [need.times(layout.rollout_devices) for need in rollout]
        return [*everyone, Need("overhead", RAY_GIB * GIB, "assumed")]
    if workload.placement == "colocated":
        return trainer + rollout
    if phase == "weight_sync":
        return max(trainer, rollout, key=total)
    # The side at work; the other one waits with less than it holds at its own work.
    return rollout if phase == "generation" else trainer


def _weakest(needs: Iterable[Need]) -> Origin:
    return min((need.origin for need in needs), key=lambda origin: WEAKEST_FIRST.index(origin))
