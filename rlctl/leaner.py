"""Settings under which a run needs less memory than it was planned for: what the planner would choose on less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlctl_hw.plan import plan
from rlctl_hw.remedies import remedies
from rlctl_hw.types import DoesNotFit, Hardware, Plan, Workload

from rlctl.planning import with_memory

FACTORS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the memory that are planned for, in turn."""
SAVES = ("engine.", "rollout.")
"""Sections whose choices make the difference."""


@dataclass(frozen=True)
class Leaner:
    """The nearest settings that need less, and of what share of the memory the planner chooses them."""

    settings: dict[str, Any]
    share: float


def leaner(asked: Workload, hardware: Hardware, made: Plan) -> Leaner | None:
    """Return the nearest settings that need less than `made` does; None where nothing in the planner's reach does."""
    before = {choice.key: choice.value for choice in made.choices}
    for factor in FACTORS:
        small = with_memory(hardware, factor)
        try:
            chosen = plan(asked, small, with_remedies=False).choices
        except DoesNotFit:
            ways = [remedy.settings for remedy in remedies(asked, small) if remedy.settings]
            return Leaner(ways[0], factor) if ways else None
        ours = [one for one in chosen if one.key.startswith(SAVES)]
        changed = {one.key: one.value for one in ours if before.get(one.key) != one.value}
        if changed:
            return Leaner(changed, factor)
    return None
