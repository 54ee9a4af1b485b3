"""What another value would do to the plan: the run is planned again with it, and the two plans are compared.

A plan follows from the workload and the hardware alone, so a change that leaves the workload as it is changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlctl_hw.explain import PHASE_WORDS
from rlctl_hw.memory import peak_gib
from rlctl_hw.model_catalogue import known_ids, known_shape
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import Hardware, Plan

from rlctl import planning
from rlctl.explaining.alternatives import Alternative
from rlctl.resolve import Resolved
from rlctl.workload import shape_of, workload_from_config
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.model import PretrainedModel, RandomModel

Kind = Literal["independent", "same", "changed", "fits", "does not fit", "invalid"]
NOTICED = 0.005
"""Changes of memory and of time that are told, as a share of the peak and of the step."""
HOST = "a node's host memory"
MOST_CHOICES = 4
"""Of the planner's other choices that change, in text; a document has them all."""


@dataclass(frozen=True)
class Planned:
    """A run and what follows from it on some hardware: its plan, or why there is none."""

    resolved: Resolved
    hardware: Hardware
    plan: Plan | None
    refusal: str | None = None


@dataclass(frozen=True)
class Change:
    """A number of the plan with another value, and how far that is from what it was, where a plan was."""

    what: str
    value: float
    by: float | None

    def is_noticed(self, whole: float | None = None) -> bool:
        """Say whether the change is worth telling, as a share of `whole` (or of the number itself)."""
        return self.by is not None and abs(self.by) > NOTICED * (self.value if whole is None else whole)


@dataclass(frozen=True)
class Effect:
    """What a value does: in words, and where it can be planned, in numbers (GiB and seconds)."""

    kind: Kind
    text: str
    peak: Change | None = None
    """Of the fullest phase."""
    phase: Change | None = None
    """The phase that changes most, where that is another."""
    host: Change | None = None
    """A node's memory beside its accelerators, where it changes."""
    step_s: Change | None = None
    choices: tuple[tuple[str, Any, Any], ...] = ()
    """Other keys that the planner sets otherwise: key, value then, value now."""


def planned(resolved: Resolved, hardware: Hardware) -> Planned:
    """Plan a run; what stands against it is kept in words."""
    try:
        return Planned(resolved, hardware, planning.plan_here(resolved.config, hardware))
    except UserError as error:
        return Planned(resolved, hardware, None, error.what)


def effect(run: Planned, key: str, other: Alternative) -> Effect:
    """Return what an alternative of a key does to the plan of a run."""
    if other.varied is None:
        return Effect("invalid", f"not valid: {other.problem}")
    if is_independent(run.resolved.config, other.varied.config):
        return Effect("independent", "predicted memory and step time stay as they are")
    then = planned(other.varied, run.hardware)
    if then.plan is None:
        return Effect("does not fit", f"does not fit: {then.refusal}")
    return _compared(key, run, then.plan, other.varied)


def is_independent(before: RunConfig, after: RunConfig) -> bool:
    """Say whether a change leaves what is asked of the hardware as it is, whatever the model's sizes are."""
    stand_in = known_shape(known_ids()[0])
    assert stand_in is not None, "every known id has a shape"
    same_workload = workload_from_config(before, stand_in) == workload_from_config(after, stand_in)
    return same_workload and _same_sizes(before, after)


def _compared(key: str, run: Planned, then: Plan, varied: Resolved) -> Effect:
    now = run.plan
    peak, step_s = _peak(now, then), _step(now, then)
    if now is None:
        return Effect("fits", f"fits: {_words((peak,), step_s, ())}", peak, step_s=step_s)
    phase, host = _most_changed(now, then, peak), _host(now, then)
    choices = tuple(_choices(key, run, then, varied))
    numbers = [one for one in (peak, phase, host) if one is not None]
    if not choices and not any(one.is_noticed() for one in [*numbers, *([step_s] if step_s else [])]):
        exact = not any(one.by for one in [peak, *([step_s] if step_s else [])])
        text = "the same plan" if exact else f"the same plan within {NOTICED:.1%}"
        return Effect("same", text, peak, step_s=step_s)
    return Effect("changed", _words(numbers, step_s, choices), peak, phase, host, step_s, choices)


def _peak(now: Plan | None, then: Plan) -> Change:
    fullest = max(then.bands, key=lambda band: band.gib)
    by = None if now is None else fullest.gib - max(band.gib for band in now.bands)
    return Change(fullest.phase, fullest.gib, by)


def _most_changed(now: Plan, then: Plan, peak: Change) -> Change | None:
    before = {band.phase: band.gib for band in now.bands}
    moved = [Change(b.phase, b.gib, b.gib - before[b.phase]) for b in then.bands if b.phase in before]
    most = max(moved, key=lambda one: abs(one.by or 0.0), default=None)
    is_told = most is not None and most.what != peak.what and most.is_noticed(peak.value)
    return most if is_told else None


def _host(now: Plan, then: Plan) -> Change | None:
    """Return the change of the host's memory; on CPU it is the device's."""
    if then.device == "cpu" or not now.host_memory or not then.host_memory:
        return None
    gib = peak_gib(then.host_memory)[1]
    change = Change(HOST, gib, gib - peak_gib(now.host_memory)[1])
    return change if change.is_noticed() else None


def _step(now: Plan | None, then: Plan) -> Change | None:
    after = step_seconds(then)
    before = None if now is None else step_seconds(now)
    return None if after is None else Change("step", after[0], None if before is None else after[0] - before[0])


def _choices(key: str, run: Planned, then: Plan, varied: Resolved) -> list[tuple[str, Any, Any]]:
    """Return the planner's choices for other keys that are not what holds now."""
    before = {choice.key: choice.value for choice in run.plan.choices} if run.plan else {}
    given = {k: origin.value for k, origin in run.resolved.origins.items() if origin.value is not None}
    holds = given | before
    return [
        (choice.key, choice.value, holds.get(choice.key))
        for choice in then.choices
        if choice.key != key and choice.value != holds.get(choice.key) and choice.key in varied.origins
    ]


def _words(memory: Sequence[Change], step_s: Change | None, choices: tuple[tuple[str, Any, Any], ...]) -> str:
    peak, *others = memory
    parts = [f"peak {_gib(peak)} in {_phase(peak.what)}", *(f"{_phase(one.what)} {_gib(one)}" for one in others)]
    parts += [f"step {_number(step_s.value)} s{_by(step_s, _number)}"] if step_s else []
    for key, value, was in choices[:MOST_CHOICES]:
        parts.append(f"{key}={_plain(value)}" + ("" if was is None else f" (now {_plain(was)})"))
    more = len(choices) - MOST_CHOICES
    return "; ".join(parts) + (f"; and {more} more of the planner's choices" if more > 0 else "")


def _phase(name: str) -> str:
    return PHASE_WORDS.get(name, name.replace("_", " "))


def _gib(change: Change) -> str:
    digits = 1 if change.value >= 10 else 2
    return f"{change.value:.{digits}f} GiB{_by(change, lambda value: f'{value:.{digits}f}')}"


def _by(change: Change, form: Callable[[float], str]) -> str:
    if change.by is None:
        return ""
    return f" ({'+' if change.by > 0 else '-'}{form(abs(change.by))})" if change.is_noticed() else " (as now)"


def _number(value: float) -> str:
    """Return three digits of a number, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same_sizes(before: RunConfig, after: RunConfig) -> bool:
    """Say whether two runs' models have the same sizes, as far as that is known without looking any up on the hub."""
    one, other = before.model, after.model
    if isinstance(one, PretrainedModel) and isinstance(other, PretrainedModel):
        return (one.path, one.revision) == (other.path, other.revision)
    return isinstance(one, RandomModel) and isinstance(other, RandomModel) and shape_of(before) == shape_of(after)
