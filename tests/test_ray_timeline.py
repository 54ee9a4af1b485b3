"""Ray's timeline of a run: whose events are kept, of which time, under which names; a real one is made in a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlctl_train.profiling import ray_timeline
from rlctl_train.profiling.ray_timeline import Event, keep, of_job, trace
from rlctl_train.profiling.timeline import SUFFIX, Timeline

JOB, OTHER = "02000000", "01000000"


def call(process: str, name: str, at_us: float, job: str = JOB, for_us: float = 10.0, node: str = "10.0.0.1") -> Event:
    args = {"name": name, "task_id": "ab" * 20 + job}
    return {"ph": "X", "pid": node, "tid": f"worker:{process}", "name": name, "ts": at_us, "dur": for_us, "args": args}


def part(process: str, name: str, at_us: float) -> Event:
    """What Ray tells of a call without saying of which."""
    return {**call(process, name, at_us), "args": {}}


def submit(job: str, at_us: float) -> Event:
    return {**part("", "submit_task", at_us), "tid": f"driver:{job}ffffffff"}


def test_only_the_processes_of_the_job_are_told_of() -> None:
    own = [submit(JOB, 0), part("w1", "task:execute", 1), call("w1", "update", 1)]
    others = [submit(OTHER, 0), part("w2", "task:execute", 1), call("w2", "secret", 1, OTHER), part("w3", "idle", 2)]
    both = [call("w4", "update", 1), call("w4", "secret", 2, OTHER)]
    assert of_job([*others, *own, *both], JOB) == own


def test_processes_have_names_and_what_lies_outside_the_steps_is_left_out() -> None:
    events = [call("w9", "probe", 95), call("w1", "generate", 85, node="10.0.0.2"), call("w2", "update", 120)]
    outside = [call("w1", "early", 80), call("w2", "late", 131)]
    made = trace(
        [*events, *outside, submit(JOB, 100)], {"w2": "actor worker 0", "w1": "rollout worker 0"}, (91_000, 130_000)
    )
    named = {one["pid"]: one["args"]["name"] for one in made["traceEvents"] if one["name"] == "process_name"}
    assert list(named.values()) == [
        "driver (10.0.0.1)", "actor worker 0 (10.0.0.1)", "rollout worker 0 (10.0.0.2)", "worker:w9 (10.0.0.1)",
    ]  # fmt: skip
    calls = {(named[one["pid"]].partition(" (")[0], one["name"]) for one in made["traceEvents"] if one["ph"] == "X"}
    expected = [("driver", "submit_task"), ("actor worker 0", "update"), ("rollout worker 0", "generate")]
    assert calls == {*expected, ("worker:w9", "probe")}


def test_the_last_calls_are_waited_for_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    early, last = call("w1", "update", 5), call("w1", "stop_recording", 20)
    told: list[list[Event]] = [[early], [early], [early, last]]
    monkeypatch.setattr(ray_timeline.ray, "timeline", lambda: told.pop(0))
    arrived: Any = ray_timeline._arrived
    assert arrived(JOB, {"w1": "actor worker 0"}, (0, 10_000)) == [early, last]
    monkeypatch.setattr(ray_timeline, "ARRIVED_WITHIN_S", 0.0)
    monkeypatch.setattr(ray_timeline.ray, "timeline", lambda: [early])
    assert arrived(JOB, {"w1": "actor worker 0"}, (0, 10_000)) == [early]
    assert "may lack the last calls of actor worker 0" in capsys.readouterr().err


def test_a_timeline_that_cannot_be_had_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> list[Event]:
        raise KeyError("a kind of event that Ray has no colour for")

    keep(tmp_path, {})
    assert "warning: no timeline of Ray: UserError" in capsys.readouterr().err
    (tmp_path / "step_000001").mkdir()
    timeline = Timeline(lambda: 0)
    with timeline("step"):
        pass
    timeline.write(tmp_path / "step_000001" / f"driver-0{SUFFIX}", role="driver", rank=0, host="a", device="cpu")
    monkeypatch.setattr(ray_timeline.ray, "timeline", fails)
    keep(tmp_path, {})
    assert "warning: no timeline of Ray: " in capsys.readouterr().err
    assert not list(tmp_path.glob("ray_timeline*"))
