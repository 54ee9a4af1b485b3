"""What a step waits for: the critical path adds up to it, and bubbles are where devices stand still."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlctl_train.profiling.spans import outside
from rlctl_train.profiling.waiting import bubbles, critical_path
from tests.test_profiling_steps import ranges, the_step, write


def test_the_critical_path_follows_whoever_ends_last_and_adds_up_to_the_step(tmp_path: Path) -> None:
    folder = tmp_path / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 1000, 0), ("gen", 0, 400, 1), ("update_actor", 410, 1000, 1)))
    write(folder, "rollout", 0, ranges(("generation", 10, 200, 0)))
    write(folder, "rollout", 1, ranges(("generation", 20, 390, 0)))
    inner = [("micro-batch 1", 450, 900, 1), ("forward", 450, 600, 2), ("backward", 600, 900, 2)]
    more = [("micro-batch 2", 900, 960, 1), ("backward", 910, 960, 2)]
    write(folder, "actor", 0, ranges(("actor_update", 430, 980, 0), *inner, *more))
    links = critical_path(the_step(tmp_path))
    assert sum(link.seconds for link in links) == pytest.approx(1.0)
    ms = {(link.phase, link.who, link.what): round(link.seconds * 1e3) for link in links}
    assert ms == {
        ("gen", "rollout 1", "generation"): 370,
        ("gen", "calls and data", "calls and data"): 30,
        ("update_actor", "actor 0", "backward"): 350,
        ("update_actor", "actor 0", "forward"): 150,
        ("update_actor", "actor 0", "actor_update"): 40,
        ("update_actor", "actor 0", "micro-batch"): 10,
        ("update_actor", "calls and data", "calls and data"): 40,
        ("between phases", "calls and data", "calls and data"): 10,
    }
    assert [link.seconds for link in links] == sorted((link.seconds for link in links), reverse=True)


def test_work_that_goes_on_when_the_last_begins_was_not_what_that_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 100, 0), ("update_weights", 0, 100, 1)))
    write(folder, "actor", 0, ranges(("weight_sync", 0, 70, 0)))
    write(folder, "rollout", 0, ranges(("weight_sync", 10, 30, 0), ("weight_sync", 60, 95, 0)))
    ms = {(link.who): round(link.seconds * 1e3) for link in critical_path(the_step(tmp_path))}
    assert ms == {"rollout 0": 55, "calls and data": 45}


def test_a_bubble_says_which_device_waits_in_which_phase_and_for_whom(tmp_path: Path) -> None:
    folder = tmp_path / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 1000, 0), ("gen", 0, 600, 1), ("update_actor", 600, 1000, 1)))
    write(folder, "rollout", 0, ranges(("generation", 0, 500, 0)), slot=1, device="cuda")
    write(folder, "actor", 0, ranges(("actor_update", 600, 1000, 0)), slot=0, device="cuda")
    write(folder, "critic", 0, ranges(("values", 0, 100, 0)), slot=0, device="cuda")
    write(folder, "score", 0, ranges(("score", 450, 550, 0)))
    found = {(one.device, one.phase, one.meanwhile): round(one.seconds * 1e3) for one in bubbles(the_step(tmp_path))}
    assert found == {
        ("cuda 0", "gen", "rollout"): 350,
        ("cuda 0", "gen", "rollout and score"): 50,
        ("cuda 0", "gen", "score"): 50,
        ("cuda 0", "gen", "calls and data"): 50,
        ("cuda 1", "gen", "score"): 50,
        ("cuda 1", "gen", "calls and data"): 50,
        ("cuda 1", "update_actor", "actor"): 400,
    }


def test_roles_that_share_a_device_leave_no_bubble_to_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 100, 0), ("gen", 0, 60, 1), ("update_actor", 60, 100, 1)))
    write(folder, "rollout", 0, ranges(("generation", 0, 60, 0)), slot=0)
    write(folder, "actor", 0, ranges(("actor_update", 60, 100, 0)), slot=0)
    assert bubbles(the_step(tmp_path)) == []


def test_what_spans_leave_of_another() -> None:
    assert outside([(2, 4), (4, 5), (8, 12)], (0, 10)) == [(0, 2), (5, 8)]
    assert outside([], (0, 10)) == [(0, 10)] and outside([(0, 10)], (0, 10)) == []
