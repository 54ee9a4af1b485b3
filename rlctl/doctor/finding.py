"""What a check answers: one finding, merged from the problems it met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `fail` stops a run, `warn` lets it pass."""

    status: Literal["warn", "fail"]
    what: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """The answer of one check: its status, what was found, and each problem with its way out."""

    name: str
    status: Status
    what: str
    problems: tuple[Problem, ...] = ()

    @property
    def remedy(self) -> str:
        """Return the ways out of all problems in one line."""
        return "; ".join(dict.fromkeys(problem.remedy for problem in self.problems))


def fail(what: str, remedy: str) -> Problem:
    """Return a problem that stops a run."""
    return Problem("fail", what, remedy)


def warn(what: str, remedy: str) -> Problem:
    """Return a problem that a run survives, slower or with luck."""
    return Problem("warn", what, remedy)


def skip(name: str, why: str) -> Finding:
    """Return the finding of a check that has nothing to look at here."""
    return Finding(name, "skip", why)


def verdict(name: str, problems: Iterable[Problem], fine: str) -> Finding:
    """Merge problems into one finding, the failing ones first; without any, `fine` says what was seen."""
    found = tuple(sorted(problems, key=lambda problem: problem.status != "fail"))
    if not found:
        return Finding(name, "ok", fine)
    return Finding(name, found[0].status, "; ".join(problem.what for problem in found), found)
