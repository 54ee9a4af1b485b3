"""Ray for real: jobs on an existing cluster with a token, private clusters beside it, and kill -9 of each process."""

from __future__ import annotations

import gzip
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlctl import app, launchers, rundir
from rlctl.launchers.ray_api import NoAnswer, dashboard_at
from rlctl.rundir import Run
from rlctl_train.config.layout import RunFiles
from tests import runs

pytestmark = pytest.mark.slow
HEAD = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
USUAL_AGENT_PORT = 52365


@dataclass(frozen=True)
class Foreign:
    """A cluster that somebody else started."""

    url: str
    token: str
    process: subprocess.Popen[bytes]

    def takes_jobs(self) -> bool:
        """Return whether a job submitted to it runs to its end."""
        board, name = dashboard_at(self.url), f"hello-{secrets.token_hex(3)}"
        board.submit({"entrypoint": "echo hello", "submission_id": name})
        wait_for(lambda: board.job(name)["status"] not in ("PENDING", "RUNNING"), "the job did not end")
        return board.job(name)["status"] == "SUCCEEDED"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    """A head with a dashboard and a token; its processes are one session, and end with it."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # Ray's sockets lie below: their paths must be short
    ports = free_ports(3)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port")
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own_python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = (tmp_path_factory.mktemp("foreign") / "head.log").open("w")
    head = subprocess.Popen(
        [*HEAD, *flags, f"--temp-dir={folder}", "--object-store-memory=100000000"],
        env=os.environ | secret | own_python, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    os.environ |= secret
    cluster = Foreign(f"http://127.0.0.1:{ports[1]}", secret["RAY_AUTH_TOKEN"], head)
    try:
        wait_for(lambda: has_nodes(cluster), "the head did not come up")
        yield cluster
    finally:
        head.terminate()
        head.wait(60)
        log.close()
        for name in secret:
            del os.environ[name]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def at_home(foreign: Foreign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for runs; what a failed test leaves running in it is killed."""
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("digit_reward.py"), tmp_path)
    config = runs.CONFIG | {
        "reward": {"type": "custom", "path": "digit_reward.py:digits"},
        "validation": {"every_steps": 0},
        "checkpoint": {"every_steps": 2, "export_hf": False},
        "telemetry": {"trackers": []},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    yield tmp_path / "runs"
    for run in rundir.every(tmp_path / "runs"):
        launchers.load(run.config()["launch"]["type"]).kill(run)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def has_nodes(cluster: Foreign) -> bool:
    assert cluster.process.poll() is None, "the head ended early"
    try:
        return bool(dashboard_at(cluster.url).nodes())
    except NoAnswer:
        return False


def wait_for(condition: Callable[[], Any], otherwise: str) -> None:
    """Wait for a condition, with a limit; not for a length of time."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def launch(root: Path, name: str, steps: int, *words: str) -> Run:
    arguments = ["launch", "-c", "tiny.json", f"trainer.num_steps={steps}", "--name", name, "-d", "-y", *words]
    assert app.run(arguments) == 0
    return rundir.Run(RunFiles(root / name))


def at_step(run: Run, step: int) -> None:
    """Wait until a run works on `step`."""

    def is_there() -> bool:
        launchers.fetch(run)
        status = run.status()
        log = run.files.driver_log
        assert status.state not in rundir.ENDED, log.read_text() if log.exists() else status
        return status.state == "running" and status.step >= step

    wait_for(is_there, f"step {step} was not reached")


def ended(run: Run) -> str:
    """Wait for the end of a run and return its state."""
    wait_for(lambda: run.status().state in rundir.ENDED, "the run did not end")
    return run.status().state


def driver_of(run: Run) -> int:
    """Fetch how a run stands and return the process of its driver, which is on this machine."""
    launchers.fetch(run)
    return json.loads(run.files.status.read_text())["pid"]


def processes(run: Run) -> list[psutil.Process]:
    """Return the driver and everything below it."""
    driver = psutil.Process(driver_of(run))
    return [driver, *driver.children(recursive=True)]


def named(found: list[psutil.Process], name: str) -> psutil.Process:
    return next(process for process in found if process.name() == name)


def called(trace: Path) -> set[str]:
    """Return what a timeline of Ray shows of the driver and the workers; nobody else may be in it."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [one["args"]["name"].partition(" (")[0] for one in events if one["name"] == "process_name"]
    assert named == ["driver", "actor worker 0", "rollout worker 0", "score worker"]
    return {one["name"] for one in events if one["ph"] == "X"}


def gone(found: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)


def test_a_job_outlives_its_driver_is_stopped_resumed_killed_and_resumed_to_its_end(
    foreign: Foreign, at_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recorded = ("profile.tool=torch", "profile.first_step=2", "profile.last_step=2")
    run = launch(at_home, "far", 4000, "--ray", foreign.url, f"launch.folder={at_home.parent / 'there'}", *recorded)
    at_step(run, 3)
    driver = processes(run)
    driver[0].kill()
    wait_for(lambda: driver_of(run) != driver[0].pid, "no other driver came")
    at_step(run, 5)
    driver += processes(run)
    capfd.readouterr()
    assert app.run(["runs", "stacks", "far"]) == 0
    assert "== actor worker 0: " in capfd.readouterr().out and list(run.files.logs.glob("stacks-*.txt"))
    assert json.loads((run.files.doctor / "node-0.json").read_text())["counts"].get("fail") is None
    assert app.run(["runs", "stop", "far"]) == 0
    assert (run.status().state, gone(driver)) == ("stopped", True)
    assert "signal 9 ended the driver; started again (1 of 3)" in run.files.driver_log.read_text()
    assert app.run(["profile", "report", "far", "-o", "json"]) == 0
    profile = json.loads(capfd.readouterr().out)
    assert profile["steps"][0]["operations"]["actor 0"]["update_actor"], "its trace came home"
    assert called(run.files.profile / "ray_timeline.trace.json.gz") >= {"submit_task", "generate", "update"}
    saved = run.status().step
    folder = Path(run.job().facts["folder"])  # type: ignore[union-attr]
    assert (folder / "checkpoints" / f"step_{saved:06d}").is_dir() and not run.files.checkpoints.exists()
    assert app.run(["runs", "resume", "far", "-d"]) == 0
    at_step(run, saved + 2)
    launchers.load("ray").kill(run)
    assert ended(run) == "lost"
    shorter = json.loads(run.files.config.read_text())
    shorter["trainer"]["num_steps"] = run.status().step + 4
    run.files.config.write_text(json.dumps(shorter))
    assert app.run(["runs", "resume", "far"]) == 0
    steps = [line["step"] for line in runs.lines(run.files)]
    assert steps == list(range(1, run.status().num_steps + 1)), "no step is missing and none is repeated"
    assert run.files.summary.exists() and run.files.report.exists()
    assert foreign.takes_jobs()


def test_two_private_runs_and_a_foreign_cluster_do_not_disturb_each_other_and_a_lost_head_is_resumed(
    foreign: Foreign, at_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    near, other = launch(at_home, "near", 4000), launch(at_home, "other", 4000)
    at_step(near, 3)
    at_step(other, 2)
    everything = processes(near)
    listening = {c.laddr.port for process in everything for c in process.net_connections() if c.status == "LISTEN"}
    assert listening and USUAL_AGENT_PORT not in listening
    spared = ("monitor.py", "log_monitor.py", "dashboard.py")
    assert not [process for process in everything if any(Path(word).name in spared for word in process.cmdline())]
    named(everything, "gcs_server").kill()
    assert ended(near) == "lost"
    at_step(other, other.status().step + 2)
    below = processes(other)
    below[0].send_signal(signal.SIGKILL)
    assert ended(other) == "lost"
    wait_for(lambda: gone(everything[:1]), "the driver is still there")
    assert "GCS may have been killed" in near.files.driver_log.read_text()
    capfd.readouterr()
    app.run(["runs", "show", "near"])
    assert "rlctl runs resume" in capfd.readouterr().err
    assert app.run(["runs", "resume", "near", "-d"]) == 0
    at_step(near, near.status().step + 3)
    everything += processes(near)
    assert app.run(["runs", "stop", "near"]) == 0
    assert near.status().state == "stopped"
    wait_for(lambda: gone([*everything, *below]), "something is left running")
    assert foreign.process.poll() is None and foreign.takes_jobs()
