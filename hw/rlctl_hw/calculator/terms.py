"""The calculator's working record: one term of memory, and the moments of a step at which terms add up."""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw.types import Origin


@dataclass(frozen=True)
class Term:
    """Bytes of one part, how they were found, and the formula in words."""

    name: str
    num_bytes: float
    why: str
    origin: Origin = "formula"


@dataclass(frozen=True)
class Moment:
    """What is in memory together at one point of a step."""

    name: str
    terms: tuple[Term, ...]

    @property
    def num_bytes(self) -> float:
        """Return the sum of the terms."""
        return sum(term.num_bytes for term in self.terms)
