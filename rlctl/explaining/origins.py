"""Who set a value: default, settings, preset, hardware table, file, environment, command line, or the planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlctl_hw.types import Choice, Plan

from rlctl.catalog import HARDWARE
from rlctl.explaining.leaves import Leaf
from rlctl.resolve import DEFAULT, Origin, Resolved

PLANNER = "planner"


@dataclass(frozen=True)
class Setter:
    """The value that holds, the rank that set it with its own words for the source, why, and the values it beat."""

    value: Any
    set_by: str
    source: str
    reason: str | None = None
    mark: str | None = None
    """Of the planner's values: measured, formula, interpolated or assumed."""
    beat: tuple[Origin, ...] = ()
    """Highest rank first; the default is the last."""


def setter_of(leaf: Leaf, resolved: Resolved, plan: Plan | None) -> Setter:
    """Return who set a key of a run; a key left unset that the planner fills is the planner's."""
    key, given = leaf.key, resolved.origins[leaf.key]
    history = resolved.history.get(key, ())
    choice = choice_for(key, plan) if given.value is None else None
    if choice is not None:
        return Setter(choice.value, PLANNER, PLANNER, choice.reason, choice.origin, tuple(reversed(history)))
    below = (Origin(leaf.default, DEFAULT),) if leaf.beats_default and given.source != DEFAULT else ()
    beat = (*reversed(history[:-1]), *below)
    return Setter(given.value, rank_of(given.source), given.source, resolved.reasons.get(given.source), beat=beat)


def choice_for(key: str, plan: Plan | None) -> Choice | None:
    """Return what the planner set for a key, or None where it set nothing."""
    return None if plan is None else next((choice for choice in plan.choices if choice.key == key), None)


def rank_of(source: str) -> str:
    """Return the rank that a source belongs to."""
    if f"[{HARDWARE}." in source:
        return "hardware table"
    return next((rank for rank in ("command line", "settings", "default") if source == rank), source.split(" ")[0])
