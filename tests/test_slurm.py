"""Runs on a real Slurm of two nodes, by the real command: to the end, and through whatever a cluster does to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlctl_train.config.layout import RunFiles
from tests import runs, slurm_cluster
from tests.plain import plain_accuracy
from tests.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

RLCTL = Path(sys.executable).with_name("rlctl")
STEPS = 16
LIMIT_S = 240.0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if (reason := slurm_cluster.why_not()) is not None:
        pytest.skip(reason)
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@dataclass(frozen=True)
class Desk:
    """A person at a login node: a folder, the command, and a hand on the run's brake."""

    folder: Path
    slurm: SlurmCluster

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    def rlctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.slurm.environment | {"RLCTL_HOME": str(self.folder), "NO_COLOR": "1"}
        return subprocess.run(
            [RLCTL, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=2 * LIMIT_S
        )

    def launch(self, name: str, *words: str) -> RunFiles:
        """Start a run of two nodes, with a worker of each kind on both, and go on without it."""
        place = ("--slurm", "--nodes", "2", "launch.memory_gib=4")
        cpus = ("--gpus", "cpu:2", "trainer.num_devices=2")
        self.config()
        words = words if "--gpus" in words else (*cpus, *words)
        done = self.rlctl("launch", "-c", "run.json", *place, "--name", name, "--detach", "-y", *words)
        assert done.returncode == 0, done.stderr
        return RunFiles(self.folder / "runs" / name)

    def config(self) -> None:
        reward = {"type": "custom", "path": f"{Path(__file__).with_name('digit_reward.py')}:held_digits"}
        sections = {
            **runs.CONFIG,
            "reward": {**reward, "kwargs": {"hold": str(self.hold)}},
            "grader": {"time_limit_s": LIMIT_S},
            "trainer": {**runs.CONFIG["trainer"], "num_steps": STEPS},
            "validation": {"every_steps": 0, "max_prompts": 8},
        }
        (self.folder / "run.json").write_text(json.dumps(sections))

    def job(self, files: RunFiles) -> str:
        return json.loads(files.driver.read_text())["id"]

    def facts(self, files: RunFiles) -> dict[str, str]:
        shown = self.slurm.ask("scontrol", "--oneliner", "show", "job", self.job(files))
        return dict(word.partition("=")[::2] for word in shown.split())

    def stop_at(self, files: RunFiles, step: int) -> None:
        """Hold the run in the middle of a step, `step` or one soon after."""
        self.until(files, lambda: runs.status(files).get("state") == "running" and runs.status(files)["step"] >= step)
        self.hold.touch()

    def let_go(self) -> None:
        self.hold.unlink()

    def until(self, files: RunFiles, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain:\n{runs.log(files)}"
            time.sleep(0.02)

    def until_said(self, files: RunFiles, what: str, times: int = 1) -> None:
        self.until(files, lambda: files.driver_log.exists() and runs.log(files).count(what) >= times)

    def follow(self, files: RunFiles) -> str:
        """Follow the run's log to its end, as from another terminal."""
        return self.rlctl("runs", "logs", "-f", files.root.name).stdout

    def show(self, files: RunFiles) -> dict[str, Any]:
        done = self.rlctl("runs", "show", files.root.name, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def desk(tmp_path: Path, slurm: SlurmCluster) -> Desk:
    return Desk(tmp_path, slurm)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, slurm: SlurmCluster) -> RunFiles:
    desk = Desk(tmp_path_factory.mktemp("whole"), slurm)
    files = desk.launch("whole")
    desk.stop_at(files, 1)
    places = [psutil.Process(pid).environ() for pid in workers(files).values()]
    assert {place["SLURMD_NODENAME"] for place in places} == {"n1", "n2"}
    desk.let_go()
    said = desk.follow(files)
    assert desk.show(files)["status"]["state"] == "done", said
    assert desk.facts(files)["JobState"] == "COMPLETED"
    token = places[0]["RAY_AUTH_TOKEN"].encode()
    assert not any(token in file.read_bytes() for file in files.root.rglob("*") if file.is_file())
    return files


def workers(files: RunFiles) -> dict[str, int]:
    return json.loads((files.logs / "workers.json").read_text())


def check_same(files: RunFiles, undisturbed: RunFiles) -> None:
    """The run is done and has learnt, step by step, what it would have learnt in peace."""
    assert runs.status(files)["state"] == "done", runs.log(files)
    assert runs.learning_trace(files) == runs.learning_trace(undisturbed)
    summaries = [json.loads(one.summary.read_text())["val_accuracy_end"] for one in (files, undisturbed)]
    assert summaries[0] == summaries[1]


def test_a_run_on_two_nodes_reaches_its_end_and_the_cluster_is_gone(undisturbed: RunFiles, slurm: SlurmCluster) -> None:
    assert [line["step"] for line in runs.lines(undisturbed)] == list(range(1, STEPS + 1))
    assert all(line["actor/grad_norm"] > 0 for line in runs.lines(undisturbed)), "nothing is learnt"
    number = json.loads(undisturbed.driver.read_text())["id"]
    alive = psutil.process_iter(["environ"])
    assert not [one for one in alive if (one.info["environ"] or {}).get("SLURM_JOB_ID") == number]
    assert not Path(f"/tmp/rlctl-ray-{number}").exists()


def test_a_run_that_loses_a_worker_is_preempted_and_meets_its_time_limit_learns_the_same(
    desk: Desk, undisturbed: RunFiles
) -> None:
    files = desk.launch("unlucky", "launch.time_limit=30", "launch.save_before_s=90")
    assert desk.facts(files)["TimeLimit"] == "00:30:00"
    desk.stop_at(files, 3)
    runs.kill(workers(files)["actor worker 1"])
    desk.let_go()
    desk.until(files, lambda: runs.status(files)["restarts"] == 1)
    desk.stop_at(files, 6)
    assert desk.facts(files)["Restarts"] == "0", "the same job goes on"
    desk.slurm.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    desk.until_said(files, "SIGTERM: saving after this step")
    desk.let_go()
    desk.until(files, lambda: desk.show(files)["status"]["state"] == "queued")
    desk.until_said(files, "start 2,")
    desk.stop_at(files, 10)
    assert desk.facts(files)["Restarts"] == "1"
    desk.slurm.ask("scontrol", "update", f"JobId={desk.job(files)}", "TimeLimit=2")
    desk.until_said(files, "SIGTERM: saving after this step", times=2)
    desk.let_go()
    desk.until(files, lambda: desk.facts(files)["JobState"] == "PENDING")
    desk.slurm.ask("scontrol", "update", f"JobId={desk.job(files)}", "TimeLimit=30")
    said = desk.follow(files)
    assert "saved to make room: the job queues again" in said and "start 3," in said
    check_same(files, undisturbed)


@pytest.mark.long
def test_a_node_that_ray_loses_costs_no_more_than_the_last_save(desk: Desk, undisturbed: RunFiles) -> None:
    files = desk.launch("parted")
    desk.stop_at(files, 8)
    raylet = psutil.Process(workers(files)["actor worker 1"]).parent()
    assert raylet is not None and raylet.name() == "raylet"
    raylet.kill()
    desk.let_go()
    said = desk.follow(files)
    assert "back to the last checkpoint: the job queues again" in said
    assert "SIGTERM: saving" not in said
    check_same(files, undisturbed)


@pytest.mark.long
def test_a_node_that_dies_whole_with_driver_and_head_costs_no_more_than_the_last_save(
    desk: Desk, undisturbed: RunFiles
) -> None:
    files = desk.launch("struck")
    desk.stop_at(files, 5)
    desk.slurm.lose_node("n1")
    desk.let_go()
    desk.until(files, lambda: desk.facts(files)["JobState"] == "PENDING")
    desk.slurm.start_node("n1")
    assert "start 2," in desk.follow(files)
    assert not (files.launch / f"losses-{desk.job(files)}").exists(), "no fault of the run"
    check_same(files, undisturbed)


@pytest.mark.long
def test_losses_beyond_max_restarts_end_the_job_with_the_drivers_code(desk: Desk) -> None:
    files = desk.launch("hopeless", "launch.max_restarts=0")
    desk.stop_at(files, 2)
    runs.kill(runs.status(files)["pid"])
    desk.let_go()
    assert "restarts so far: 0 of launch.max_restarts=0" in desk.follow(files)
    assert desk.facts(files)["ExitCode"] == "137:0"
    shown = desk.rlctl("runs", "show", "hopeless")
    assert "lost" in shown.stdout and "rlctl runs resume hopeless" in shown.stderr


@pytest.mark.long
def test_stop_saves_and_leaves_the_queue_and_resume_submits_anew(desk: Desk, undisturbed: RunFiles) -> None:
    files = desk.launch("halved")
    desk.stop_at(files, 5)
    stopping = subprocess.Popen(
        [RLCTL, "runs", "stop", "halved"], cwd=desk.folder, env=os.environ | desk.slurm.environment
    )
    desk.until_said(files, "SIGTERM: saving after this step")
    desk.let_go()
    assert stopping.wait(LIMIT_S) == 0
    assert desk.show(files)["status"]["state"] == "stopped"
    first = desk.facts(files)
    assert (first["ExitCode"], first["Restarts"]) == ("130:0", "0")
    assert desk.rlctl("runs", "resume", "halved").returncode == 0
    assert desk.job(files) != first["JobId"]
    check_same(files, undisturbed)


def test_scancel_ends_the_job_for_good(desk: Desk) -> None:
    files = desk.launch("cancelled")
    desk.stop_at(files, 2)
    desk.slurm.ask("scancel", desk.job(files))
    desk.until(files, lambda: desk.facts(files)["JobState"] == "CANCELLED")
    desk.follow(files)
    assert desk.show(files)["status"]["state"] in ("lost", "stopped", "failed")
    assert desk.facts(files)["Restarts"] == "0"
    assert "rlctl runs resume cancelled" in desk.rlctl("runs", "show", "cancelled").stderr
    desk.let_go()


def test_a_controller_that_is_down_is_said_and_a_waiting_job_shows_why_it_waits(desk: Desk) -> None:
    files = desk.launch("patient", 'launch.sbatch=["--begin=now+1hour"]')
    assert (desk.show(files)["status"]["state"], desk.show(files)["status"]["phase"]) == ("queued", "BeginTime")
    desk.slurm.stop_controller()
    try:
        assert "is down or out of reach" in desk.show(files)["status"]["phase"]
        stopped = desk.rlctl("runs", "stop", "patient")
        assert (stopped.returncode, "controller is down" in stopped.stderr) == (5, True)
        refused = desk.rlctl("launch", "-c", "run.json", "--slurm", "--gpus", "cpu:2", "--name", "never", "-y")
        assert (refused.returncode, "controller is down" in refused.stderr) == (5, True)
        assert not (desk.folder / "runs" / "never").exists()
    finally:
        desk.slurm.start_controller()
    assert desk.rlctl("runs", "stop", "patient").returncode == 0
    assert desk.facts(files)["JobState"] == "CANCELLED"


@pytest.mark.long
def test_a_node_that_is_not_as_planned_ends_the_job_with_code_4(desk: Desk) -> None:
    files = desk.launch("misplaced", "--gpus", "h100:4", "launch.cpus_per_node=4", "trainer.num_devices=8")
    assert "queues again" not in desk.follow(files)
    assert desk.facts(files)["ExitCode"] == "4:0"
    status = desk.show(files)["status"]
    assert status["state"] == "failed" and "planned for 4 x h100-80gb" in status["error"]["what"]


STAND_IN = """#!/bin/sh
case $2 in
    rlctl_train) exec {python} {script} "$3" ;;
    rlctl.app) exit 0 ;;
    *) exec {python} "$@" ;;
esac
"""
LOOK = """
import json, os, sys
import ray
from rlctl_train.cluster import connect
from rlctl_train.config.trainer import RayConfig
connect(RayConfig(), needed={"GPU": 8.0}, object_store_gib=0.1)
look = ray.remote(lambda: {name: value for name, value in os.environ.items() if "VISIBLE_DEVICES" in name})
seen = ray.get([look.options(num_gpus=4, scheduling_strategy="SPREAD").remote() for _ in range(2)])
with open(sys.argv[1] + "/seen.json", "w") as file:
    json.dump(seen, file)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("machine", "variable"), [("h100:4", "CUDA_VISIBLE_DEVICES"), ("mi300x:4", "HIP_VISIBLE_DEVICES")]
)
def test_every_node_offers_the_devices_of_its_gres_under_one_variable(desk: Desk, machine: str, variable: str) -> None:
    """A stand-in for the interpreter passes the doctor, and asks Ray what it was given; the devices are made up."""
    stand_in, script = desk.folder / "python", desk.folder / "look.py"
    stand_in.write_text(STAND_IN.format(python=sys.executable, script=script))
    stand_in.chmod(0o755)
    script.write_text(LOOK)
    files = desk.launch(
        "devices",
        "--gpus",
        machine,
        f"launch.environment.python={stand_in}",
        "launch.cpus_per_node=4",
        "trainer.num_devices=8",
    )
    said = desk.follow(files)
    assert desk.facts(files)["JobState"] == "COMPLETED", said
    for node in json.loads((files.root / "seen.json").read_text()):
        assert sorted(node[variable].split(",")) == ["0", "1", "2", "3"]
        assert "ROCR_VISIBLE_DEVICES" not in node


def test_the_quickstart_learns_to_add_on_two_nodes(desk: Desk) -> None:
    place = ("--slurm", "--nodes", "2", "--gpus", "cpu:2", "launch.memory_gib=6")
    done = desk.rlctl("launch", "quickstart", *place, "trainer.num_devices=2", "--name", "sums", "-y")
    assert done.returncode == 0, done.stderr
    files = RunFiles(desk.folder / "runs" / "sums")
    summary = json.loads(files.summary.read_text())
    assert summary["val_accuracy_start"] < 0.5 < 0.9 < summary["val_accuracy_end"]
    assert summary["val_accuracy_end"] == pytest.approx(plain_accuracy(files), abs=0.02)
