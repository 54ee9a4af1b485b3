"""Launching, following, stopping and giving back through a stand-in for the `sky` command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlctl import app, launchers, rundir
from rlctl.launchers import cloud
from rlctl.launchers.base import Order
from rlctl.rundir import Run
from rlctl_train.config.errors import UserError
from tests.cloud_goldens import THREE, order

STAND_IN = """#!/bin/bash
# Keeps what it is told, and answers from files beside it: $1.json for `sky $1`, jobs.json for `sky jobs queue`,
# logs.txt; the file `fail` makes a launch fail.
cd "$(dirname "$0")"
echo "$*" >>calls
case "$1 $2" in
"launch "* | "jobs launch") env | grep ^RAY_AUTH_TOKEN >token; echo "no such machines"; [ ! -e fail ] ;;
"status "* | "queue "*) echo "Fetching..."; cat "$1.json" ;;
"jobs queue") cat jobs.json ;;
"logs "* | "jobs logs") cat logs.txt; exit 100 ;;
esac
"""
NAME = "rlctl-golden"


class Sky:
    """The stand-in's folder: what it was told, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sky").write_text(STAND_IN)
        (folder / "sky").chmod(0o755)
        self.answers(status=[], queue={}, jobs=[])
        (folder / "logs.txt").touch()

    def answers(self, **given: Any) -> None:
        """Have it answer so from now on."""
        for name, content in given.items():
            (self.folder / f"{name}.json").write_text(json.dumps(content))

    def told(self, verb: str) -> list[str]:
        """Return the calls that begin with the verb."""
        calls = self.folder / "calls"
        return [line for line in calls.read_text().splitlines() if line.startswith(verb)] if calls.exists() else []


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sky:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("RLCTL_SKY", str(tmp_path / "bin" / "sky"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cloud.CloudLauncher, "poll_s", 0.0)
    return Sky(tmp_path / "bin")


@pytest.fixture
def start(tmp_path: Path, sky: Sky) -> Callable[..., Run]:
    def make(**launch: Any) -> Run:
        asked: Order = order(tmp_path, **{**THREE, "bucket": "s3://b", **launch})
        asked = replace(asked, environment=dict(asked.environment) | {"PATH": "/usr/bin:/bin"})
        config, plan = asked.config.model_dump(mode="json"), asked.plan.to_json()
        run = rundir.create(tmp_path / "runs", "golden", config=config, plan=plan, origin={})
        rundir.start(run, asked)
        return run

    return make


def row(status: str, job_id: int = 1) -> dict[str, Any]:
    return {"job_id": job_id, "job_name": NAME, "status": status}


def test_what_costs_money_is_refused_where_nobody_can_be_asked(
    tmp_path: Path, sky: Sky, capfd: pytest.CaptureFixture[str], start: Callable[..., Run]
) -> None:
    assert app.run(["launch", "quickstart", "--cloud", "--gpus", "cpu:4", "--name", "dear"]) == 2
    assert "no terminal to ask on" in capfd.readouterr().err
    assert not (tmp_path / "runs" / "dear").exists() and not sky.told("launch")
    start()
    assert app.run(["runs", "stop", "golden", "--force"]) == 2
    assert app.run(["runs", "resume", "golden"]) == 2
    assert not sky.told("down") and len(sky.told("launch")) == 1


def test_a_launch_hands_over_the_task_and_a_token_that_is_written_nowhere(start: Callable[..., Run], sky: Sky) -> None:
    run = start()
    flags = "--secret HF_TOKEN --secret RAY_AUTH_TOKEN"
    assert sky.told("launch") == [f"launch --yes --detach-run --cluster {NAME} {flags} {run.files.task}"]
    token = (sky.folder / "token").read_text().strip().partition("=")[2]
    assert len(token) == 64
    written = [path.read_bytes() for path in run.files.root.rglob("*") if path.is_file()]
    assert not [text for text in written if token.encode() in text or b"hf_secret" in text]


def test_a_spot_run_is_a_managed_job(start: Callable[..., Run], sky: Sky) -> None:
    run = start(spot=True)
    assert sky.told("jobs launch")[0].startswith(f"jobs launch --yes --detach-run --name {NAME} ")
    sky.answers(jobs=[row("FAILED"), row("RECOVERING", 2)])
    assert (run.status().state, run.status().phase) == ("queued", "SkyPilot: RECOVERING")


def test_a_launch_that_fails_says_why_and_costs_nothing(
    start: Callable[..., Run], sky: Sky, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sky.folder / "fail").touch()
    records = iter([None, {"name": NAME}])
    monkeypatch.setattr(cloud.sky_queue, "cluster", lambda name: next(records))
    with pytest.raises(UserError, match="`sky launch` failed: no such machines") as refused:
        start()
    assert refused.value.exit_code == 5
    assert sky.told("down") == [f"down --yes {NAME}"]


def test_a_cluster_of_that_name_is_not_taken_over(start: Callable[..., Run], sky: Sky) -> None:
    sky.answers(status=[{"name": NAME, "status": "UP"}])
    with pytest.raises(UserError, match="has a cluster rlctl-golden already"):
        start()
    assert sky.told("launch") == sky.told("down") == []


@pytest.mark.parametrize(
    ("queue", "status", "state"),
    [
        ({NAME: [row("PENDING")]}, [], "queued"),
        ({NAME: [row("FAILED"), row("RUNNING", 2)]}, [], "running"),
        ({NAME: [row("FAILED")]}, [], "ended"),
        ({}, [{"name": NAME, "status": "INIT"}], "queued"),
        ({}, [], "ended"),
    ],
    ids=["waits", "runs again", "failed", "is being set up", "given back"],
)
def test_where_a_job_stands(
    queue: dict[str, Any], status: list[Any], state: str, start: Callable[..., Run], sky: Sky
) -> None:
    run = start()
    sky.answers(queue=queue, status=status)
    assert launchers.load("cloud").status(run).state == state


def test_a_sky_that_does_not_answer_is_no_lost_run(start: Callable[..., Run], sky: Sky) -> None:
    run = start()
    (sky.folder / "queue.json").unlink()
    (sky.folder / "status.json").unlink()
    assert launchers.load("cloud").status(run).detail == "SkyPilot does not answer"
    assert run.status().state == "pending"


def test_the_log_brings_the_run_home_with_its_exit_code(start: Callable[..., Run], sky: Sky) -> None:
    run = start()
    ended = {"state": "failed", "exit_code": 3, "started": time.time() + 1, "error": {"what": "a", "remedy": "b"}}
    (sky.folder / "logs.txt").write_text(
        f"(head, rank=0, pid=1) hello\n(head, rank=0, pid=1) rlctl::status {json.dumps(ended)}\n"
    )
    launchers.fetch(run)
    assert sky.told("logs") == [f"logs {NAME} --no-follow --tail 0"]
    assert run.files.driver_log.read_text() == "hello\n"
    assert run.status().state == "failed"
    assert launchers.load("cloud").status(run).exit_code == 3
    launchers.fetch(run)
    assert len(sky.told("logs")) == 1, "what has ended is read once"


def test_the_end_is_read_at_once_and_everything_before_at_intervals(
    start: Callable[..., Run], sky: Sky, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    monkeypatch.setattr(cloud.CloudLauncher, "poll_s", 1000.0)
    launchers.fetch(run)
    launchers.fetch(run)
    assert len(sky.told("logs")) == 1
    sky.answers(queue={NAME: [row("FAILED")]})
    assert launchers.load("cloud").status(run).state == "ended"
    launchers.fetch(run)
    assert len(sky.told("logs")) == 2


def test_the_driver_is_asked_to_save_and_where_it_is_by_ssh(
    start: Callable[..., Run], sky: Sky, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    sky.answers(queue={NAME: [row("RUNNING")]})
    (sky.folder / "ssh").write_text('#!/bin/bash\necho "ssh $*" >>"$(dirname "$0")/calls"\n')
    (sky.folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{sky.folder}:/usr/bin:/bin")
    launchers.load("cloud").interrupt(run)
    launchers.load("cloud").ask_stacks(run)
    told = [call.partition(f" {NAME} ")[2] for call in sky.told("ssh")]
    assert told == [f"touch /tmp/rlctl-{what}-$(id -u)-golden" for what in ("stop", "stacks")]


def test_a_run_that_cannot_be_reached_says_so(
    start: Callable[..., Run], sky: Sky, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    sky.answers(queue={NAME: [row("RUNNING")]})
    monkeypatch.setattr(cloud.sky_command, "on_head", lambda cluster, line: False)
    with pytest.raises(UserError, match="cannot be told to stop"):
        launchers.load("cloud").interrupt(run)
    with pytest.raises(UserError, match="cannot be asked"):
        launchers.load("cloud").ask_stacks(run)


def test_nobody_asks_where_a_managed_job_is(start: Callable[..., Run], sky: Sky) -> None:
    run = start(spot=True)
    with pytest.raises(UserError, match="managed job"):
        launchers.load("cloud").ask_stacks(run)


def test_stop_with_force_gives_the_machines_back(start: Callable[..., Run], sky: Sky, capfd: Any) -> None:
    start()
    sky.answers(queue={NAME: [row("SUCCEEDED")]})
    assert app.run(["runs", "stop", "golden", "--force", "-y"]) == 0
    assert sky.told("down") == [f"down --yes {NAME}"]
    assert "gave the machines of golden back" in capfd.readouterr().err
