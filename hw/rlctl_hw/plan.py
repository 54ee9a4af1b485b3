"""The one place that derives numbers: `plan(workload, hardware)` is pure, keeps pins, and refuses what does not fit."""

from __future__ import annotations

from dataclasses import replace

from rlctl_hw import placing, reasons, search
from rlctl_hw.remedies import remedies_for
from rlctl_hw.search import Tried
from rlctl_hw.types import DoesNotFit, Hardware, Plan, Workload


def plan(workload: Workload, hardware: Hardware, *, with_remedies: bool = True) -> Plan:
    """Return what follows from the workload on this hardware, or raise DoesNotFit with numbers and ways out.

    Finding ways out takes many plans; who tries many workloads does without.
    """
    try:
        return _plan(workload, hardware)
    except DoesNotFit as refusal:
        if refusal.remedies or not with_remedies:
            raise
        refusal.remedies = remedies_for(workload, hardware)
        raise


def _plan(workload: Workload, hardware: Hardware) -> Plan:
    found = search.tried(workload, hardware)
    chosen = search.best(found)
    if chosen is None or chosen.plan is None:
        raise _nearest(found)
    counts = placing.device_counts(workload, hardware)
    choices = (*reasons.counts(workload, counts), *chosen.plan.choices, *reasons.layout(workload, chosen, found))
    return replace(chosen.plan, choices=choices, notes=(*counts.notes, *chosen.plan.notes))


def _nearest(found: list[Tried]) -> DoesNotFit:
    """Return the refusal that lacks least memory; where memory is not what lacks, the one that saves most."""
    refusals = [one.refusal for one in found if one.refusal is not None]
    return min(reversed(refusals), key=lambda refusal: refusal.short_gib or 0.0)
