"""A run through the real SkyPilot, onto a real Slurm of two nodes on this machine: launch, stop, logs, give back."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs, sky_slurm

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(1500)]

NAME = "tiny"
PROFILED = ("actor", "rollout", "score")
DIGITS = Path(runs.__file__).with_name("digit_reward.py")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sky_slurm.SkyOnSlurm]:
    if (reason := sky_slurm.why_not()) is not None:
        pytest.skip(reason)
    # A short path: sockets below it must not be longer than 107 characters.
    root = tmp_path_factory.mktemp("s")
    with sky_slurm.running(root, Path(os.environ["RLCTL_SKY"])) as made:
        made.prepare(f"rlctl-{NAME}")
        yield made


def rlctl(cloud: sky_slurm.SkyOnSlurm, *words: str) -> str:
    """Call the command as a person would, and return both of its outputs."""
    work = cloud.root / "work"
    environment = os.environ | cloud.environment | {"RLCTL_RUNS_DIR": str(cloud.root / "runs")}
    done = subprocess.run(
        [sys.executable, "-m", "rlctl.app", *words], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_nodes_train_save_when_told_and_come_home(cloud: sky_slurm.SkyOnSlurm) -> None:
    work = cloud.root / "work"
    work.mkdir()
    shutil.copy(DIGITS, work)
    (work / "tiny.json").write_text(json.dumps(tiny()))
    place = f"launch.infra=slurm/{sky_slurm.NAME}/batch"
    words = ("launch", "tiny.json", "--gpus", "cpu:2", "--nodes", "2", place, "--name", NAME, "-y")
    said = rlctl(cloud, *words, "--detach", "trainer.num_steps=3000")
    assert "takes    2 machine(s) with 2 CPU cores each" in said
    wait_for_a_step(cloud)
    assert "== rollout worker 2: " in rlctl(cloud, "runs", "stacks", NAME)
    rlctl(cloud, "runs", "stop", NAME, "--timeout", "300")
    folder = cloud.root / "runs" / NAME
    assert status(folder)["state"] == "stopped" and status(folder)["exit_code"] == 130
    assert len(list((folder / "doctor").iterdir())) == 2
    made = {str(path.relative_to(folder / "profile")) for path in (folder / "profile").rglob("*.gz")}
    assert made == {"ray_timeline.trace.json.gz", *(f"step_000001/{one}-0.trace.json.gz" for one in PROFILED)}
    for path in (folder / "profile").rglob("*.gz"):
        assert json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "rlctl::" not in rlctl(cloud, "runs", "logs", NAME)
    rlctl(cloud, "runs", "stop", NAME, "--force", "-y")
    assert cloud.slurm.ask("squeue", "-h", "-t", "running") == ""


def tiny() -> dict[str, Any]:
    """Return the configuration of a small run with more processes than one node has cores for."""
    config = runs.CONFIG | {"reward": {"type": "custom", "path": f"{DIGITS.name}:digits"}}
    config["trainer"] = {**config["trainer"], "num_devices": 3, "prompts_per_step": 6}
    config["rollout"] = {**config["rollout"], "num_devices": 3}
    envs = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    config["profile"] = {"tool": "torch", "first_step": 1, "last_step": 1}
    return config | {"launch": {"type": "cloud", "environment": {"type": "same"}, "envs": envs}}


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def wait_for_a_step(cloud: sky_slurm.SkyOnSlurm) -> None:
    deadline = time.monotonic() + 600
    while status(cloud.root / "runs" / NAME)["step"] < 1:
        assert time.monotonic() < deadline, rlctl(cloud, "runs", "logs", NAME)
        rlctl(cloud, "runs", "ls")
