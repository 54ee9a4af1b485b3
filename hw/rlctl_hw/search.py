"""The search: every legal candidate is completed into a plan or refused; the fastest predicted one is taken.

Where no time can be predicted the order of the candidates decides: the least split and the least saving ones first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlctl_hw import layouts, placing
from rlctl_hw.completing import complete
from rlctl_hw.layouts import Candidate, RolloutSplit
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import DoesNotFit, Hardware, Mesh, Plan, Savings, Workload

MOST_MESHES = 48
"""Meshes of one search; the least split ones, which communicate least, come first."""

MOST_SAVING = 4
"""Meshes with the smallest states, one of which fits where any does."""


@dataclass(frozen=True)
class Tried:
    """One candidate with its plan, or why there is none."""

    workload: Workload
    candidate: Candidate
    plan: Plan | None
    refusal: DoesNotFit | None

    @property
    def step_s(self) -> float | None:
        """Return the expected seconds of a step."""
        seconds = None if self.plan is None else step_seconds(self.plan)
        return None if seconds is None else seconds[0]


def tried(workload: Workload, hardware: Hardware) -> list[Tried]:
    """Try the legal candidates: every mesh with one rollout degree, then every degree with the best mesh.

    The two hardly depend on each other: they meet only in the memory that one leaves to the other.
    """
    ladders = _Ladders(workload, hardware)
    found: list[Tried] = []
    for split in ladders.splits:
        found += [one for mesh in ladders.meshes for one in ladders.climb(mesh, split)]
        chosen = best(found)
        if chosen is not None:
            others = ladders.splits[ladders.splits.index(split) + 1 :]
            return found + [one for other in others for one in ladders.climb(chosen.candidate.mesh, other)]
    return found


def fits(workload: Workload, hardware: Hardware) -> bool:
    """Say whether a candidate fits: the meshes with the smallest states are tried, with all savings."""
    try:
        ladders = _Ladders(workload, hardware)
    except DoesNotFit:
        return False
    meshes = sorted(ladders.meshes, key=lambda mesh: layouts.least_bytes(workload, mesh))[:MOST_SAVING]
    places = ((mesh, split) for split in reversed(ladders.splits) for mesh in meshes)
    return any(one.plan is not None for mesh, split in places for one in ladders.descend(mesh, split))


def best(found: list[Tried]) -> Tried | None:
    """Return the fastest that fits, or the first where times are unknown; ties go to the earlier."""
    fitting = [one for one in found if one.plan is not None]
    return min(fitting, key=lambda one: one.step_s or 0.0, default=None)


class _Ladders:
    """The legal meshes and rollout degrees of a workload, and for each pair the rungs of what may be saved."""

    def __init__(self, workload: Workload, hardware: Hardware) -> None:
        self._asked = workload, hardware
        placing.check_model(workload, hardware)
        placing.check_distributions(workload)
        counts = placing.device_counts(workload, hardware)
        self._trainer, self._rollout = counts.trainer, counts.rollout
        self._rungs = layouts.savings_ladder(workload, hardware)
        self.splits = layouts.rollout_splits(workload, hardware, counts.rollout)
        self.meshes = layouts.train_meshes(workload, hardware, counts.trainer)[:MOST_MESHES]

    def top(self, mesh: Mesh, split: RolloutSplit) -> Tried:
        """Try the candidate that saves everything."""
        return self._try(mesh, split, self._rungs[-1])

    def descend(self, mesh: Mesh, split: RolloutSplit) -> Iterator[Tried]:
        """Try the rungs from the top, until one fits or lacks device memory."""
        for rung in reversed(self._rungs):
            one = self._try(mesh, split, rung)
            yield one
            if one.refusal is None or one.refusal.short_gib is not None:
                return

    def climb(self, mesh: Mesh, split: RolloutSplit) -> Iterator[Tried]:
        """Try rung after rung until saving more makes a step slower; nothing where even the top does not fit."""
        top = self.top(mesh, split)
        if top.refusal is not None and top.refusal.short_gib is not None:
            # Its device lacks memory: less saving needs no less. A host that lacks it may do with less offloaded.
            yield top
            return
        before: Tried | None = None
        for rung in self._rungs[:-1]:
            one = self._try(mesh, split, rung)
            yield one
            if one.plan is not None and (one.step_s is None or (before is not None and _slower(one, before))):
                return
            before = one if one.plan is not None else before
        yield top

    def _try(self, mesh: Mesh, split: RolloutSplit, savings: Savings) -> Tried:
        workload, hardware = self._asked
        candidate = Candidate(self._trainer, self._rollout, mesh, savings, split)
        try:
            return Tried(workload, candidate, complete(workload, hardware, candidate), None)
        except DoesNotFit as refusal:
            return Tried(workload, candidate, None, refusal)


def _slower(one: Tried, before: Tried) -> bool:
    return (one.step_s or 0.0) >= (before.step_s or 0.0)
