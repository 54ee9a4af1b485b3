"""The search: every legal candidate is completed into a plan or refused; the fastest predicted one is taken.

Where no time can be predicted the order of the candidates decides: the least split and the least saving ones first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlctl_hw import layouts, placing
from rlctl_hw.completing import complete
from rlctl_hw.layouts import Candidate
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import Corrections, DoesNotFit, Hardware, Plan, Workload

MOST_MESHES = 48
"""Meshes of one search; the least split ones, which communicate least, come first."""


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


def candidates(workload: Workload, hardware: Hardware) -> Iterator[list[Candidate]]:
    """Yield the legal candidates of each mesh and rollout degree, from saving nothing to saving everything."""
    placing.check_model(workload, hardware)
    counts = placing.device_counts(workload, hardware)
    rungs = layouts.savings_ladder(workload, hardware)
    degrees = layouts.rollout_degrees(workload, hardware, counts.rollout)
    for mesh in layouts.train_meshes(workload, hardware, counts.trainer)[:MOST_MESHES]:
        for degree in degrees:
            yield [Candidate(counts.trainer, counts.rollout, mesh, rung, degree) for rung in rungs]


def tried(workload: Workload, hardware: Hardware, corrections: Corrections | None = None) -> list[Tried]:
    """Complete every candidate; of one that does not fit with all savings, the lesser savings are not tried."""
    found: list[Tried] = []
    for rungs in candidates(workload, hardware):
        last = _try(workload, hardware, rungs[-1], corrections)
        if last.plan is None:
            found.append(last)
            continue
        found += [_try(workload, hardware, candidate, corrections) for candidate in rungs[:-1]]
        found.append(last)
    return found


def fits(workload: Workload, hardware: Hardware) -> bool:
    """Say whether any candidate fits: the most saving ones are tried first."""
    try:
        ladders = list(candidates(workload, hardware))
    except DoesNotFit:
        return False
    return any(
        _try(workload, hardware, candidate, None).plan is not None
        for place in range(1, len(ladders[0]) + 1)
        for candidate in (rungs[-place] for rungs in ladders)
    )


def best(found: list[Tried]) -> Tried | None:
    """Return the fastest that fits, or the first where times are unknown; ties go to the earlier."""
    fitting = [one for one in found if one.plan is not None]
    return min(fitting, key=lambda one: one.step_s or 0.0, default=None)


def _try(workload: Workload, hardware: Hardware, candidate: Candidate, corrections: Corrections | None) -> Tried:
    try:
        return Tried(workload, candidate, complete(workload, hardware, candidate, corrections), None)
    except DoesNotFit as refusal:
        return Tried(workload, candidate, None, refusal)
