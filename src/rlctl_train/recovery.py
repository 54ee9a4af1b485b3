"""Recovery: which failures are losses of workers, and how often a job makes up for them by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

from rlctl_train.crew import Crew, WorkersLost
from rlctl_train.status import Status


class Restarts:
    """How often this job has replaced lost workers, and how often it may."""

    def __init__(self, most: int, status: Status) -> None:
        self._most, self._status = most, status
        self.spent = 0

    @property
    def left(self) -> int:
        """How often it still may."""
        return self._most - self.spent

    def spend(self, what: str, then: str) -> None:
        """Count one more and say what happened and how it goes on."""
        assert self.left > 0
        self.spent += 1
        notice = f"{what}; {then} (restart {self.spent} of {self._most})"
        self._status.update(restarts=self.spent, notice=notice)
        print(notice, file=sys.stderr)


@contextmanager
def losses_told(crew: Crew, status: Status) -> Iterator[None]:
    """Turn whatever fails because workers are lost into WorkersLost, which names them."""
    try:
        yield
    except RayError as error:
        lost = crew.lost(error)
        if not lost:
            raise
        raise WorkersLost(tell(lost, status)) from error


def tell(lost: dict[str, str], status: Status) -> str:
    """Say which workers were lost, how, and when."""
    return f"{' and '.join(f'{name} {how}' for name, how in lost.items())} in {status.place}"
