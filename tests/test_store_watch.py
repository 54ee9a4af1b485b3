"""Ray's object stores are asked beside the work, and what was used most in between is not missed."""

from __future__ import annotations

import threading

import pytest
import ray
from ray.exceptions import RaySystemError

from rlctl_train.store_watch import NAME, StoreWatch

GIB = 2**30


def watched(monkeypatch: pytest.MonkeyPatch, *available: float | Exception) -> StoreWatch:
    """Return a watch that asked a store of 4 GiB once for each of `available`, in GiB."""
    watch, answers = StoreWatch(), iter(available)

    def answer() -> dict[str, float]:
        one = next(answers)
        if isinstance(one, Exception):
            raise one
        return {NAME: one * GIB} if one else {}

    monkeypatch.setattr(ray, "cluster_resources", lambda: {NAME: 4.0 * GIB})
    monkeypatch.setattr(ray, "available_resources", answer)
    for _ in available:
        watch.ask()
    return watch


def test_the_most_since_the_last_call_is_taken_and_then_what_was_last(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(monkeypatch, 4.0, 1.0, 3.5, RaySystemError("gone"))
    assert watch.take() == 3.0
    assert watch.take() == 0.5, "nobody answered since"


def test_a_store_that_is_full_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, 0.0, RaySystemError("gone")).take() == 4.0


def test_a_lost_cluster_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, RaySystemError("gone")).take() is None


def test_nobody_asks_any_more_once_the_body_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    asking, asked = threading.Event(), threading.Event()

    def slowly() -> dict[str, float]:
        asking.set()
        asked.wait(10)
        return {NAME: GIB}

    monkeypatch.setattr(ray, "cluster_resources", slowly)
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr("rlctl_train.store_watch.EVERY_S", 0.001)
    watch = StoreWatch()
    with watch.asking():
        asking.wait(10)
        threading.Timer(0.2, asked.set).start()
    assert watch.take() == 1.0, "the question under way was answered first"
    assert "object stores" not in {thread.name for thread in threading.enumerate()}
