"""Ranges and timelines: nothing while nobody listens, nesting and memory while somebody does."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlctl_train.config.profile import ProfileConfig
from rlctl_train.profiling.garbage import GARBAGE, collections_marked
from rlctl_train.profiling.layers import layer_ranges
from rlctl_train.profiling.ranges import listening, mark, marked
from rlctl_train.profiling.recorder import Recordable, Who
from rlctl_train.profiling.timeline import Timeline, read_ranges


def test_a_range_that_nobody_hears_is_always_the_same_nothing() -> None:
    assert mark("one") is mark("another")


def test_every_listener_is_told_of_each_range_and_of_none_afterwards() -> None:
    told: list[str] = []

    @contextmanager
    def listener(name: str) -> Iterator[None]:
        told.append(f"+{name}")
        yield
        told.append(f"-{name}")

    @marked("called")
    def named(one: int, *, other: int) -> None:
        told.append(f"{one} {other}")

    timeline = Timeline(lambda: 0)
    with listening(listener, timeline), mark("a"), mark("b"):
        named(1, other=2)
    with mark("c"):
        pass
    named(3, other=4)
    assert told == ["+a", "+b", "+called", "1 2", "-called", "-b", "-a", "3 4"]
    assert [one.name for one in timeline.ranges] == ["called", "b", "a"]


def test_a_range_that_fails_is_kept_and_the_next_is_at_its_depth() -> None:
    timeline = Timeline(lambda: 0)
    with listening(timeline):
        with pytest.raises(ValueError, match="broken"), mark("fails"):
            raise ValueError("broken")
        with mark("goes"):
            pass
    assert [(one.name, one.depth) for one in timeline.ranges] == [("fails", 0), ("goes", 0)]


def test_a_timeline_keeps_order_depth_and_memory_and_comes_back_from_its_file(tmp_path: Path) -> None:
    def aside() -> None:
        with mark("aside"):
            pass

    held = iter(range(100))
    timeline = Timeline(lambda: next(held))
    with listening(timeline), mark("outer"):
        with mark("first"):
            pass
        thread = threading.Thread(target=aside)
        thread.start()
        thread.join()
        with mark("second"):
            pass
    timeline.write(tmp_path / "x.ranges.json", role="actor")
    facts, ranges = read_ranges(tmp_path / "x.ranges.json")
    assert facts == {"schema_version": 1, "role": "actor"}
    assert [(one.name, one.depth) for one in ranges] == [("outer", 0), ("first", 1), ("aside", 0), ("second", 1)]
    outer, first, _, second = ranges
    assert (outer.bytes_before, first.bytes_before, first.bytes_after) == (0, 1, 2)
    assert outer.start_ns <= first.start_ns <= first.end_ns <= second.start_ns <= second.end_ns <= outer.end_ns


def test_every_call_of_a_layer_is_a_range_recomputed_ones_and_failed_ones_too() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("broken")

    first, second, broken = nn.Linear(2, 2), nn.Linear(2, 2), Fails()
    timeline = Timeline(lambda: 0)
    with listening(timeline), layer_ranges([first, second, broken]):
        x = torch.ones(1, 2, requires_grad=True)
        for layer in (first, second):
            x = checkpoint(layer, x, use_reentrant=False)
        x.sum().backward()
        with pytest.raises(ValueError, match="broken"):
            broken(x)
    first(x)
    names = [one.name for one in timeline.ranges]
    assert names == ["layer 0", "layer 1", "layer 1", "layer 0", "layer 2"]
    assert {one.depth for one in timeline.ranges} == {0}


def test_a_worker_records_its_ranges_and_one_that_came_later_has_nothing_to_write(tmp_path: Path) -> None:
    worker, later = Recordable(), Recordable()
    worker.start_recording(ProfileConfig(tool="ranges"), Who("actor", 1, "cpu", slot=3), tmp_path / "step")
    with mark("actor_update"):
        pass
    for one in (worker, later):
        one.stop_recording()
    with mark("afterwards"):
        pass
    facts, (only,) = read_ranges(tmp_path / "step" / "actor-1.ranges.json")
    assert (facts["role"], facts["rank"], facts["slot"], only.name) == ("actor", 1, 3, "actor_update")
    assert only.bytes_before > 0 and list(tmp_path.rglob("*.json")) == [tmp_path / "step" / "actor-1.ranges.json"]


def test_full_collections_are_ranges_while_they_are_marked_and_small_ones_are_not() -> None:
    timeline = Timeline(lambda: 0)
    with listening(timeline), collections_marked(), mark("work"):
        gc.collect(0)
        gc.collect()
    with listening(timeline):
        gc.collect()
    assert [(one.name, one.depth) for one in timeline.ranges] == [(GARBAGE, 1), ("work", 0)]


def test_a_recording_worker_tells_of_collections_but_not_of_the_one_that_clears_up_before(tmp_path: Path) -> None:
    worker = Recordable()
    try:
        worker.start_recording(ProfileConfig(tool="torch"), Who("actor", 0, "cpu"), tmp_path)
        assert len(gc.get_objects()) < gc.get_freeze_count()
        with mark("actor_update"):
            gc.collect()
        worker.stop_recording()
    finally:
        gc.unfreeze()
    _, told = read_ranges(tmp_path / "actor-0.ranges.json")
    assert [one.name for one in told] == ["actor_update", GARBAGE]
