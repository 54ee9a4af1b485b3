"""What the planner said of a run, held against what the run measured: memory and time, phase by phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rlctl_hw.types import Plan

TIMINGS = {
    "generation": "gen",
    "logprobs": "old_log_prob",
    "reference_logprobs": "ref",
    "teacher_logprobs": "teacher",
    "values": "values",
    "reward_model_logprobs": "reward_model",
    "reward_model_update": "update_reward_model",
    "actor_update": "update_actor",
    "critic_update": "update_critic",
    "weight_sync": "update_weights",
    "checkpoint": "save_checkpoint",
}
"""The planner's phases and the metrics `timing_s/*` that time them."""
BESIDE = {"checkpoint": "write_checkpoint"}
"""What times a phase instead, where it goes on beside training."""
MEMORY = "memory_gib/"


@dataclass(frozen=True)
class Held:
    """One phase: predicted and measured, None where there is no such number. Memory in GiB, time in seconds."""

    phase: str
    gib: float | None = None
    low_gib: float | None = None
    high_gib: float | None = None
    measured_gib: float | None = None
    """Largest over all steps."""
    seconds: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    measured_s: float | None = None
    """Median over the steps, the first left out where there are several."""


def against(plan: Plan, metrics: Iterable[Mapping[str, Any]]) -> tuple[Held, ...]:
    """Return the phases that have been measured, in the plan's order; `metrics` are the lines of metrics.jsonl."""
    steps = [line for line in metrics if line.get("phase") in ("train", "checkpoint")]
    bands, times = {band.phase: band for band in plan.bands}, {time.phase: time for time in plan.times}
    held = []
    for phase in dict.fromkeys([*bands, *times, *TIMINGS]):
        gib = [line[MEMORY + phase] for line in steps if MEMORY + phase in line]
        seconds = _seconds(steps, BESIDE.get(phase, phase)) or _seconds(steps, TIMINGS.get(phase, phase))
        if not gib and seconds is None:
            continue
        band, time = bands.get(phase), times.get(phase)
        held.append(
            Held(
                phase,
                *((band.gib, band.low_gib, band.high_gib) if band else (None, None, None)),
                max(gib, default=None),
                *((time.seconds, time.low_s, time.high_s) if time else (None, None, None)),
                seconds,
            )
        )
    return tuple(held)


def to_json(rows: Iterable[Held]) -> list[dict[str, Any]]:
    """Return the rows as plain values."""
    return [asdict(row) for row in rows]


def _seconds(steps: list[Mapping[str, Any]], name: str) -> float | None:
    """Return the median; the first step also compiles, fills caches and starts threads."""
    found = [line[f"timing_s/{name}"] for line in steps if f"timing_s/{name}" in line]
    return median(found[1:] or found) if found else None
