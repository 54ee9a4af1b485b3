"""Starting a private Ray on a machine that is too busy for Ray's own patience."""

from __future__ import annotations

from typing import Any

import pytest

from rlctl_train import cluster
from rlctl_train.config.errors import LAUNCH, UserError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


class SlowRay:
    """Stands in for the module `ray`: the first starts fail."""

    def __init__(self, failures: int, message: str = SLOW) -> None:
        self.failures, self.message, self.starts, self.shutdowns = failures, message, 0, 0

    def init(self, **settings: Any) -> str:
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception(self.message)
        return "connected"

    def shutdown(self) -> None:
        self.shutdowns += 1


def start(slow: SlowRay, monkeypatch: pytest.MonkeyPatch, deadline: float) -> Any:
    monkeypatch.setattr(cluster, "ray", slow)
    monkeypatch.setattr(cluster, "_trim_ray", lambda: None)
    return cluster._start(deadline=deadline)


def test_a_start_that_was_too_slow_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowRay(failures=2)
    assert start(slow, monkeypatch, float("inf")) == "connected"
    assert (slow.starts, slow.shutdowns) == (3, 2)


def test_a_start_that_stays_too_slow_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ray\.start_timeout_s") as caught:
        start(SlowRay(failures=9), monkeypatch, 0.0)
    assert caught.value.exit_code == LAUNCH


def test_any_other_failure_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="no space"):
        start(SlowRay(failures=1, message="no space left"), monkeypatch, float("inf"))
