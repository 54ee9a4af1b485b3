"""The run folder: whole or absent, one driver, and a truthful state."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlctl import launchers, rundir
from rlctl.follow import Tail, Watch, curves
from rlctl.launchers.base import Job, JobStatus, Order
from rlctl.launchers.local import LocalLauncher
from rlctl.plot import braille
from rlctl.rundir import Status
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import write_json
from tests.runs import PLAN


def make(root: Path, name: str = "first", **status: Any) -> rundir.Run:
    run = rundir.create(root, name, config={"seed": 0}, plan={}, origin={})
    if status:
        write_json(run.files.status, {"schema_version": 1, "step": 3, "num_steps": 9, **status})
    return run


def set_driver(run: rundir.Run, *, pid: int, started: float, host: str | None = None) -> None:
    job = Job("local", str(pid), host or socket.gethostname(), "/", 0.0, {"process_started": started})
    write_json(run.files.driver, job.to_json())


def order(run: rundir.Run) -> Order:
    data, model = {"type": "arithmetic"}, {"type": "random"}
    config = RunConfig.model_validate({"data": data, "model": model, "reward": data})
    return Order(run.files.root, config, PLAN, run.files.root, {})


def test_a_new_run_is_pending_and_whole(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.status().state == "pending"
    assert {p.name for p in run.files.root.iterdir()} == {
        "config.json",
        "plan.json",
        "origin.json",
        "status.json",
        "logs",
    }


def test_a_name_in_use_is_refused_and_the_old_run_untouched(tmp_path: Path) -> None:
    make(tmp_path, state="done")
    with pytest.raises(UserError, match="in use") as caught:
        make(tmp_path)
    assert "runs resume first" in caught.value.remedy
    assert rundir.find(tmp_path, "first").status().state == "done"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "a b", "ä", "x" * 101])
def test_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a run's name"):
        make(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir, "write_json", full)
    with pytest.raises(UserError, match="No space left") as caught:
        make(tmp_path / "runs")
    assert caught.value.exit_code == 5
    assert list((tmp_path / "runs").iterdir()) == []


def test_automatic_names_are_legal_for_any_file_name() -> None:
    for base in ("quickstart", "my config", ".x", "ü", ""):
        assert rundir.NAME.fullmatch(rundir.auto_name(base))


def test_runs_are_listed_oldest_first_and_drafts_are_not(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "a")):
        os.utime(make(tmp_path, name).files.config, (age, age))
    (tmp_path / ".c.1.tmp").mkdir()
    assert [run.name for run in rundir.every(tmp_path)] == ["b", "a"]
    assert rundir.every(tmp_path / "none") == []


def test_an_unknown_run_shows_the_nearest_name(tmp_path: Path) -> None:
    make(tmp_path, "quickstart-1")
    with pytest.raises(UserError) as caught:
        rundir.find(tmp_path, "quickstart-2")
    assert caught.value.remedy == "did you mean quickstart-1?"


def test_a_run_is_found_by_its_folder_too(tmp_path: Path) -> None:
    assert rundir.find(tmp_path / "elsewhere", str(make(tmp_path).files.root)).name == "first"


def test_a_running_state_whose_driver_is_gone_is_lost(tmp_path: Path) -> None:
    run = make(tmp_path, state="running")
    me = psutil.Process()
    set_driver(run, pid=me.pid, started=me.create_time())
    assert run.status().state == "running"
    set_driver(run, pid=me.pid, started=me.create_time() - 60)  # the number was given to another process
    assert run.status().state == "lost"
    set_driver(run, pid=2**22 + 1, started=0)
    assert run.status().state == "lost"


def test_a_driver_on_another_host_is_believed(tmp_path: Path) -> None:
    run = make(tmp_path, state="running")
    set_driver(run, pid=1, started=0, host="elsewhere.invalid")
    assert run.status().state == "running"
    with pytest.raises(UserError, match="not here"):
        LocalLauncher().interrupt(run)


def test_one_driver_per_run(tmp_path: Path) -> None:
    run = make(tmp_path, state="running")
    with run.files.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being started"):
            rundir.start(run, order(run))
    me = psutil.Process()
    set_driver(run, pid=me.pid, started=me.create_time())
    with pytest.raises(UserError, match="already running"):
        rundir.start(run, order(run))


def test_a_job_of_another_version_is_named(tmp_path: Path) -> None:
    run = make(tmp_path, state="running")
    write_json(run.files.driver, {"launcher": "local", "pid": 1})
    with pytest.raises(UserError, match="not a job of this version"):
        run.status()


class Told:
    """A launcher that says what it is told to."""

    def __init__(self, standing: JobStatus, last: str | None = None) -> None:
        self.standing, self.last = standing, last

    def status(self, run: rundir.Run) -> JobStatus:
        return self.standing

    def fetch(self, run: rundir.Run) -> None:
        if self.last is not None:
            run.files.status.write_text(json.dumps({"state": self.last}))


@pytest.mark.parametrize(
    ("written", "standing", "state"),
    [
        ("pending", JobStatus("queued", "Resources"), "queued"),
        ("stopped", JobStatus("queued", "BeginTime"), "queued"),
        ("running", JobStatus("queued", "Preempted"), "queued"),
        ("running", JobStatus("running"), "running"),
        ("running", JobStatus("unknown", "the controller is down"), "running"),
        ("running", JobStatus("ended"), "lost"),
        ("failed", JobStatus("ended"), "failed"),
        ("done", JobStatus("running"), "done"),
    ],
    ids=str,
)
def test_a_run_stands_where_its_job_does(
    written: str, standing: JobStatus, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, state=written)
    set_driver(run, pid=1, started=0)
    monkeypatch.setattr(launchers, "load", lambda name: Told(standing))
    assert run.status().state == state
    assert state != "queued" or run.status().phase == standing.detail


def test_a_run_that_ended_while_it_was_looked_at_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, state="running")
    set_driver(run, pid=1, started=0)
    monkeypatch.setattr(launchers, "load", lambda name: Told(JobStatus("ended"), last="stopped"))
    assert run.status().state == "stopped"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.files.status.write_text("{")
    with pytest.raises(UserError, match=r"status\.json"):
        run.status()


def test_tail_waits_for_whole_lines_and_starts_over_when_the_file_shrinks(tmp_path: Path) -> None:
    file = tmp_path / "x"
    tail = Tail(file)
    assert tail.lines() == []
    file.write_text("a\nb")
    assert tail.lines() == ["a"]
    file.write_text("a\nbc\n")
    assert tail.lines() == ["bc"]
    file.write_text("z\n")
    assert tail.lines() == ["z"]


METRICS = """\
{"step": 0, "time": 1, "phase": "validation", "val-core/a/acc/mean@1": 0.25, "val-core/b/acc/mean@1": 0.75}
{"step": 1, "time": 2, "phase": "train", "critic/score/mean": 0.5, "perf/throughput": 100.0, "timing_s/step": 2.0}
not json
{"step": 2, "time": 3, "phase": "train", "critic/score/mean": 0.75, "perf/throughput": 200.0, "timing_s/step": 4.0}
{"step": 2, "time": 4, "phase": "validation", "val-core/a/acc/mean@1": 1.0}
"""


def test_progress_is_read_from_the_metrics(tmp_path: Path) -> None:
    run = make(tmp_path, state="running")
    run.files.metrics.write_text(METRICS)
    watch = Watch(run)
    assert len(watch.poll()) == 4
    progress = watch.progress()
    assert (progress.reward, progress.accuracy, progress.tokens_per_s, progress.left_s) == (0.75, 1.0, 200.0, 18.0)
    assert watch.poll() == []


def test_who_follows_a_run_that_goes_back_reads_why_and_no_step_twice(tmp_path: Path) -> None:
    run = make(tmp_path, state="running")
    watch, kept = Watch(run), METRICS.splitlines(keepends=True)[:2]
    run.files.metrics.write_text(METRICS)
    watch.poll()
    run.files.metrics.write_text("".join(kept))
    assert watch.poll() == []
    run.files.metrics.write_text("".join(kept) + '{"step": 2, "time": 9, "phase": "train"}\n')
    assert [row["time"] for row in watch.poll()] == [9]
    assert [watch.news(Status("running", notice=line)) for line in (None, "died", "died")] == [None, "died", None]


def test_curves_are_accuracy_and_reward(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.files.metrics.write_text(METRICS)
    assert curves(run) == {"held-out accuracy": [(0, 0.5), (2, 1.0)], "reward": [(1, 0.5), (2, 0.75)]}


def test_the_plot_rises_with_the_curve_and_bears_flat_ones() -> None:
    lines = braille([(0, 0.0), (10, 1.0)], width=10, height=4)
    assert lines[0].startswith("1 ┤") and lines[-2].startswith("0 ┤")
    assert len(lines[0]) > len(lines[-2])
    assert lines[-1].split() == ["0", "10", "step"]
    assert braille([(1, 0.5), (2, 0.5)], width=4, height=2)


def test_stop_gives_up_in_time(tmp_path: Path) -> None:
    assert launchers.stop(make(tmp_path), timeout_s=0)
