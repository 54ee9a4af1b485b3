"""Every way to run a workload, ranked by predicted step time, each loser with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from rlctl_hw import search
from rlctl_hw.search import Tried
from rlctl_hw.types import DoesNotFit, EngineName, Hardware, Pins, Placement, Plan, Workload

OWN_PINS: dict[EngineName, tuple[str, ...]] = {
    "fsdp2": ("reshard_after_forward",),
    "megatron": (
        "host_optimizer_share", "tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel",
        "sequence_parallel",
    ),
}  # fmt: skip
"""Pins that only one engine knows."""


@dataclass(frozen=True)
class Ranked:
    """One way to run; `lost` says why it is not the first, and is empty for the first."""

    engine: EngineName
    placement: Placement
    tried: Tried | None
    lost: str


def rank(workload: Workload, hardware: Hardware) -> list[Ranked]:
    """Try both engines and both placements with all of their layouts; the fastest first, what does not fit last.

    Of one layout the best savings stand for all.
    """
    fitting: list[Tried] = []
    refused: list[Ranked] = []
    for asked in _ways(workload, hardware):
        try:
            found = search.tried(asked, hardware)
        except DoesNotFit as refusal:
            refused.append(Ranked(asked.engine, asked.placement, None, refusal.what))
            continue
        best = _best_savings(found)
        fitting += [one for one in best if one.plan is not None]
        refused += [
            Ranked(asked.engine, asked.placement, one, one.refusal.what) for one in best if one.refusal is not None
        ]
    # Without predicted times the order in which they were tried stays: the least split first.
    fitting.sort(key=lambda one: one.step_s or 0.0)
    ranked = [
        Ranked(one.workload.engine, one.workload.placement, one, _why(one, fitting[0]) if place else "")
        for place, one in enumerate(fitting)
    ]
    return ranked + refused


def _ways(workload: Workload, hardware: Hardware) -> Iterator[Workload]:
    """Yield the workload as asked, then with the other placement and the other engine."""
    engines = sorted(get_args(EngineName), key=lambda engine: engine != workload.engine)
    placements = sorted(get_args(Placement), key=lambda placement: placement != workload.placement)
    for engine in engines:
        if engine == "megatron" and (hardware.kind == "cpu" or workload.lora_rank):
            continue
        for placement in placements:
            yield replace(workload, engine=engine, placement=placement, pins=_pins(workload, engine, placement))


def _pins(workload: Workload, engine: EngineName, placement: Placement) -> Pins:
    """Return the pins that hold there too: not those of the other engine alone, nor counts of another placement."""
    pins = workload.pins
    if engine != workload.engine:
        pins = replace(pins, **dict.fromkeys(OWN_PINS[workload.engine]))
        if engine == "fsdp2" and pins.recompute == "selective":
            pins = replace(pins, recompute=None)
    if placement != workload.placement:
        pins = replace(pins, trainer_devices=None, rollout_devices=None)
    return pins


def _best_savings(found: list[Tried]) -> list[Tried]:
    """Return the fastest of each layout, or a refusal where none of its savings fits."""
    groups: dict[object, list[Tried]] = {}
    for one in found:
        groups.setdefault((one.candidate.mesh, one.candidate.rollout), []).append(one)
    return [search.best(group) or group[-1] for group in groups.values()]


def _why(one: Tried, first: Tried) -> str:
    assert one.plan is not None and first.plan is not None
    if one.step_s is None or first.step_s is None:
        return "no time is predicted here: less split and less saving ways come first"
    phase, more = _slowest_difference(one.plan, first.plan)
    if one.step_s - first.step_s < 0.005 * first.step_s:
        return "as fast"
    return f"{one.step_s - first.step_s:.3g} s slower, {phase} most: {more:+.3g} s"


def _slowest_difference(plan: Plan, first: Plan) -> tuple[str, float]:
    before = {time.phase: time.seconds for time in first.times}
    more = {time.phase: time.seconds - before.get(time.phase, 0.0) for time in plan.times if time.per_step}
    phase = max(more, key=lambda name: more[name])
    return phase, more[phase]
